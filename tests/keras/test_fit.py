"""``fit`` scales the loss wherever a layer computes in float16, and only there."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest

from halfstep.errors import LossScaleError, LossScaleExhausted, LossScaleWarning
from halfstep.keras import (
    DynamicLossScale,
    FixedLossScale,
    LossScaleOptimizer,
    Policy,
    PolicyMap,
    policy_scope,
)

X = np.linspace(-1, 1, 32, dtype="float32").reshape(8, 4)
Y = X.sum(1, keepdims=True)
DYNAMIC = DynamicLossScale()

pytestmark = pytest.mark.filterwarnings(
    # of a float16 last layer, which is not what these tests are about
    "ignore::halfstep.errors.PolicyWarning"
)


def model(**options):
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(2, **options, name="first"),
            keras.layers.Dense(1, **options, name="last"),
        ]
    )


def under(policy):
    with policy_scope(policy):
        return model()


class Lazy(keras.Model):
    """A model whose layers are made as it is built."""

    def build(self, _):
        self.dense = keras.layers.Dense(1, dtype="mixed_float16")
        self.dense.build((None, 4))

    def call(self, x):
        return keras.ops.cast(self.dense(x), "float32")


MODELS = {
    "global": (lambda: under("mixed_float16"), DYNAMIC),
    "global, fixed": (
        lambda: under(Policy("mixed_float16", loss_scale=1024)),
        FixedLossScale(1024),
    ),
    "global, object": (
        lambda: under(Policy("mixed_float16", loss_scale=DynamicLossScale(8))),
        DynamicLossScale(8),
    ),
    "global, none": (lambda: under(Policy("mixed_float16", loss_scale=None)), None),
    "layers": (lambda: model(dtype="mixed_float16"), DYNAMIC),
    "layers, fixed": (
        lambda: model(dtype=Policy("mixed_float16", loss_scale=64)),
        FixedLossScale(64),
    ),
    "layers, none": (lambda: model(dtype=Policy("mixed_float16", loss_scale=None)), None),
    "one layer": (
        lambda: keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(2),
                keras.Sequential([keras.layers.Dense(1, dtype="mixed_float16")]),
            ]
        ),
        DYNAMIC,
    ),
    "map": (lambda: under(PolicyMap("mixed_float16", {"sequential.*/last": "float32"})), DYNAMIC),
    "map, fixed": (lambda: under(PolicyMap(Policy("mixed_float16", 32))), FixedLossScale(32)),
    "map of keras": (
        lambda: under_keras(
            keras.dtype_policies.DTypePolicyMap(keras.DTypePolicy("mixed_float16"))
        ),
        DYNAMIC,
    ),
    "pure float16": (lambda: under("float16"), DYNAMIC),
    "policy of keras": (lambda: under_keras(keras.DTypePolicy("mixed_float16")), DYNAMIC),
    "float32": (lambda: model(), None),
    "bfloat16": (lambda: under("mixed_bfloat16"), None),
}


def under_keras(policy):
    keras.config.set_dtype_policy(policy)
    return model()


@pytest.mark.parametrize("name", MODELS)
def test_compile_chooses_the_loss_scale(name):
    make, scale = MODELS[name]
    trained = make()
    trained.compile(keras.optimizers.SGD(), "mse")
    assert getattr(trained.optimizer, "loss_scale", None) == scale
    assert isinstance(trained.optimizer, LossScaleOptimizer) is (scale is not None)


def test_fit_shows_its_state_in_the_policy_as_the_guide_does():
    policy = Policy("mixed_float16", loss_scale=DynamicLossScale(8))
    trained = under(policy)
    trained.compile("sgd", "mse")
    trained.fit(X, Y, batch_size=2, epochs=2, verbose=0)
    assert "current_loss_scale=8.0, num_good_steps=8, initial_loss_scale=8.0" in repr(policy)
    assert trained.optimizer.skipped_steps == 0
    assert int(trained.optimizer.iterations) == 8


def test_small_gradients_train_in_float16():
    """2**-26 times 2**-1 underflows in float16: unscaled, the weights would stay."""
    for scaled, moves in ((True, True), (False, False)):
        trained = keras.Sequential(
            [keras.Input((1,)), keras.layers.Dense(1, dtype="mixed_float16", use_bias=False)]
        )
        trained.set_weights([np.float32([[1.0]])])
        small = lambda y, p: keras.ops.mean(keras.ops.cast(p, "float32") * 2.0**-26)  # noqa: E731
        trained.compile(keras.optimizers.SGD(2.0**20), small, auto_scale_loss=scaled)
        trained.fit(np.ones((2, 1)), np.ones((2, 1)), verbose=0)
        assert (float(trained.get_weights()[0][0, 0]) != 1.0) is moves


def test_bad_batches_are_skipped_and_training_goes_on():
    trained = model(dtype=Policy("mixed_float16", loss_scale=DynamicLossScale(64)))
    trained.compile(keras.optimizers.SGD(0.01), "mse")
    trained.fit(X, Y, batch_size=8, verbose=0)
    before = trained.get_weights()
    trained.fit(X * np.nan, Y, batch_size=8, epochs=3, verbose=0)
    for old, new in zip(before, trained.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert trained.optimizer.skipped_steps == 3
    trained.fit(X, Y, batch_size=8, verbose=0)
    assert any((a != b).any() for a, b in zip(before, trained.get_weights(), strict=True))


@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_a_run_that_only_skips_ends_with_an_error(how):
    trained = model(dtype=Policy("mixed_float16", loss_scale=DynamicLossScale(2)))
    trained.compile("sgd", "mse")
    before = trained.get_weights()

    def train():
        if how == "fit":
            trained.fit(X * np.nan, Y, batch_size=1, epochs=10, verbose=0)
        for _ in range(40):
            trained.train_on_batch(X * np.nan, Y)

    with pytest.raises(LossScaleExhausted, match="steps in a row"):
        train()
    # it comes a few steps late at most, and leaves the model as it was
    assert trained.optimizer.skipped_steps < 8 + 3 * 8 + 1
    for old, new in zip(before, trained.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_optimizer_of_the_users_stays():
    for mine in (
        LossScaleOptimizer("sgd", 8),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
    ):
        trained = model(dtype="mixed_float16")
        trained.compile(mine, "mse")
        assert trained.optimizer is mine


def test_a_factor_of_the_users_becomes_the_fixed_scale():
    """Keras drops it and scales dynamically."""
    trained = under("mixed_float16")
    trained.compile(keras.optimizers.SGD(loss_scale_factor=64.0), "mse")
    assert trained.optimizer.loss_scale == FixedLossScale(64)
    assert trained.optimizer.inner_optimizer.loss_scale_factor is None
    trained.fit(X, Y, verbose=0)
    assert int(trained.optimizer.iterations) == 1


def test_a_factor_that_contradicts_the_policy_is_told():
    trained = under(Policy("mixed_float16", loss_scale=1024))
    mine = keras.optimizers.SGD(loss_scale_factor=64.0)
    with pytest.raises(LossScaleError, match=r"loss_scale_factor=64\.0"):
        trained.compile(mine, "mse")
    assert mine.loss_scale_factor == 64.0


def test_policies_that_ask_for_different_scales_are_told():
    trained = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(2, dtype=Policy("mixed_float16", loss_scale=8), name="a"),
            keras.layers.Dense(1, dtype=Policy("mixed_float16", loss_scale=16), name="b"),
        ]
    )
    with pytest.raises(LossScaleError, match=r"a: FixedLossScale\(8\.0\); .*b: Fixed"):
        trained.compile("sgd", "mse")
    trained.compile(LossScaleOptimizer("sgd", 8), "mse")


def test_float16_layers_made_after_compile_are_told():
    trained = Lazy()
    trained.compile("sgd", "mse")
    with pytest.warns(LossScaleWarning, match=r"'lazy.*dense.*call compile\(\) again"):
        trained.fit(X, Y, verbose=0)
    trained.compile("sgd", "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LossScaleWarning)
        trained.fit(X, Y, verbose=0)
    assert isinstance(trained.optimizer, LossScaleOptimizer)


def test_a_training_step_that_forgets_to_scale_is_told(backend):
    if backend == "jax":
        pytest.skip("the step of this backend is written in the next test")

    class Forgetful(keras.Sequential):
        def train_step(self, data):
            x, y = data
            return _forgetful_step(self, x, y)

    trained = Forgetful([keras.Input((4,)), keras.layers.Dense(1, dtype="mixed_float16")])
    trained.compile("sgd", "mse")
    with pytest.warns(LossScaleWarning, match="no loss was scaled"):
        trained.fit(X, Y, verbose=0)


def _forgetful_step(trained, x, y):
    if keras.backend.backend() == "torch":
        trained.zero_grad()
        trained.compute_loss(x, y, trained(x, training=True)).backward()
        grads = [weight.value.grad for weight in trained.trainable_weights]
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = trained.compute_loss(x, y, trained(x, training=True))
        grads = tape.gradient(loss, trained.trainable_weights)
    trained.optimizer.apply(grads, trained.trainable_weights)
    return {"steps": 1.0}


def test_auto_scale_loss_false_is_respected_and_saved(tmp_path):
    trained = under("mixed_float16")
    trained.compile("sgd", "mse", auto_scale_loss=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LossScaleWarning)
        trained.fit(X, Y, verbose=0)
    assert not isinstance(trained.optimizer, keras.optimizers.LossScaleOptimizer)
    trained.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not isinstance(loaded.optimizer, keras.optimizers.LossScaleOptimizer)


@pytest.mark.parametrize("name", ["global", "global, fixed", "layers", "map", "pure float16"])
def test_a_saved_model_goes_on_scaling(name, tmp_path):
    """Keras loses the optimizer's state where the global policy is float32 on loading."""
    make, scale = MODELS[name]
    trained = make()
    trained.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    trained.fit(X, Y, batch_size=4, verbose=0)
    trained.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is LossScaleOptimizer
    assert loaded.optimizer.loss_scale == scale
    pairs = zip(
        [*trained.variables, *trained.optimizer.variables],
        [*loaded.variables, *loaded.optimizer.variables],
        strict=True,
    )
    for one, other in pairs:
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_callbacks_find_the_learning_rate():
    trained = under("mixed_float16")
    trained.compile(keras.optimizers.SGD(0.5), "mse")
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    trained.fit(X, Y, epochs=2, verbose=0, callbacks=[schedule])
    assert float(trained.optimizer.learning_rate) == 0.125


def test_averages_end_in_the_weights():
    trained = under(Policy("mixed_float16", loss_scale=DynamicLossScale(8)))
    trained.compile(keras.optimizers.SGD(0.5, use_ema=True), "mse")
    trained.fit(X, Y, epochs=2, verbose=0)
    assert int(trained.optimizer.iterations) == 2
    averages = trained.optimizer.inner_optimizer._model_variables_moving_average
    for weight, average in zip(trained.trainable_variables, averages, strict=True):
        np.testing.assert_array_equal(weight.numpy(), average.numpy())


def test_a_model_without_an_optimizer_is_left_alone():
    trained = under("mixed_float16")
    trained.compile(optimizer=None, loss="mse")
    assert trained.optimizer is None
    assert trained.evaluate(X, Y, verbose=0) >= 0
