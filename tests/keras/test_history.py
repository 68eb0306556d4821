"""What the callback records of fit, and that it waits for nothing."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest

from halfstep.keras import LossScaleHistory, LossScaleOptimizer, policy_scope


def model_of(optimizer="sgd", policy="mixed_float16"):
    with policy_scope(policy):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.set_weights([np.full((2, 1), 0.01, "float32"), np.zeros(1, "float32")])
    # what XLA would compile for TensorFlow takes longer than it trains
    model.compile(optimizer, "mse", jit_compile=keras.backend.backend() == "jax")
    return model


def data(bad, steps=6):
    x = np.ones((steps, 2), "float32")
    x[bad] = np.inf
    return x, np.zeros((steps, 1), "float32")


def fit(model, bad=(), steps=6, epochs=1):
    recorded = LossScaleHistory()
    history = model.fit(
        *data(list(bad), steps), batch_size=1, shuffle=False, verbose=0, epochs=epochs,
        callbacks=[recorded],
    )  # fmt: skip
    return recorded, history.history


def test_scales_and_skipped_steps_are_those_of_each_step():
    recorded, _ = fit(model_of(), bad=[1, 4])
    assert recorded.scales == [2.0**15, 2.0**14, 2.0**14, 2.0**14, 2.0**13, 2.0**13]
    assert recorded.skipped == [0, 1, 0, 0, 1, 0]
    assert len(recorded.seconds) == 6
    assert min(recorded.seconds) > 0


def test_the_logs_of_an_epoch_are_of_that_epoch():
    recorded, logs = fit(model_of(), bad=[2], epochs=3)
    assert logs["loss_scale"] == [2.0**14, 2.0**13, 2.0**12]
    assert logs["skipped_steps"] == [1, 1, 1]
    expected = [
        np.mean(part)
        for part in (recorded.seconds[1:6], recorded.seconds[6:12], recorded.seconds[12:])
    ]
    assert logs["step_seconds"] == pytest.approx(expected)


def test_more_steps_than_are_read_together(monkeypatch):
    monkeypatch.setattr("halfstep.keras.history.TOGETHER", 4)
    recorded, _ = fit(model_of(), bad=[3, 8], steps=10)
    assert [step for step, skipped in enumerate(recorded.skipped) if skipped] == [3, 8]
    assert recorded.scales[-1] == 2.0**13


def test_a_model_that_does_not_scale_has_times_alone():
    recorded, logs = fit(model_of(policy="float32"))
    assert (recorded.scales, recorded.skipped) == ([], [])
    assert len(recorded.seconds) == 6
    assert "loss_scale" not in logs
    assert logs["step_seconds"][0] > 0


def test_a_second_fit_counts_from_where_the_optimizer_stands():
    model = model_of(LossScaleOptimizer("sgd"))
    fit(model, bad=[0])
    recorded, logs = fit(model, bad=[1])
    assert recorded.skipped == [0, 1, 0, 0, 0, 0]
    assert logs["skipped_steps"] == [1]


def test_training_is_the_same_with_it_and_without():
    results = []
    for callbacks in ([], [LossScaleHistory()]):
        model = model_of()
        model.fit(*data([2]), batch_size=1, shuffle=False, verbose=0, callbacks=callbacks)
        results.append([*model.get_weights(), model.optimizer.loss_scale_state()])
    assert np.array_equal(results[0][0], results[1][0])
    assert results[0][2] == results[1][2]


def test_the_train_function_is_left_as_it_was_even_after_an_error():
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    model = model_of(policy="float32")
    recorded = LossScaleHistory()
    with pytest.raises(KeyboardInterrupt):
        model.fit(*data([]), epochs=2, verbose=0, callbacks=[recorded, Stop()])
    again, _ = fit(model)
    assert len(again.seconds) == 6
    assert len(recorded.seconds) == 1  # nothing of the second training
    plain = model.train_function
    fit(model)
    assert model.train_function is plain


def test_keras_is_not_made_to_wait_for_each_batch():
    # Keras reads all logs after each batch for a callback that has one of these
    names = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
    assert not set(names) & set(vars(LossScaleHistory))


def test_what_comes_behind_it_sees_its_numbers(tmp_path):
    model = model_of()
    log = tmp_path / "log.csv"
    model.fit(
        *data([0]), batch_size=1, shuffle=False, verbose=0,
        callbacks=[LossScaleHistory(), keras.callbacks.CSVLogger(str(log))],
    )  # fmt: skip
    header, row = log.read_text().splitlines()
    told = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(told["loss_scale"]) == 2.0**14
    assert int(told["skipped_steps"]) == 1
    assert math.isfinite(float(told["step_seconds"]))
