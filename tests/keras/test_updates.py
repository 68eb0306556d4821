"""What a step does: to the weights, to the inner optimizer, to the scale."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from halfstep import NoLossScale
from halfstep.errors import LossScaleExhausted
from halfstep.keras import DynamicLossScale, FixedLossScale, LossScaleOptimizer

INNER = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.1),
    "decay and clipping": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1, clipnorm=0.5),
    "global clipping": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.5),
    "averages": lambda: keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "accumulation": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    "schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    ),
}
GRADIENTS = [(0.3, -2.0), (1e-6, 4.0), (0.5, 0.25), (-3.0, 0.0)]


def bare(inner, variables, gradients):
    for pair in gradients:
        inner.apply([ops.convert_to_tensor(np.float32([value])) for value in pair], variables)


@pytest.mark.parametrize(
    ("name", "style"), [*((name, "keras") for name in INNER), ("global clipping", "guide")]
)
def test_it_updates_as_the_inner_optimizer_does(step, variable, values, name, style):
    """Powers of two move exponents only: every number is that of the unscaled run."""
    expected = [variable(1.0), variable(-2.0)]
    inner = INNER[name]()
    bare(inner, expected, GRADIENTS)
    ours = [variable(1.0), variable(-2.0)]
    optimizer = LossScaleOptimizer(INNER[name](), DynamicLossScale(initial_scale=2**10))
    for pair in GRADIENTS:
        step(optimizer, ours, [[value] for value in pair], style)
    for mine, other in zip(values(optimizer, ours), [*expected, *inner.variables], strict=True):
        np.testing.assert_allclose(mine, other.numpy(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "bad"), [*((name, np.nan) for name in INNER), ("adam", np.inf), ("adam", -np.inf)]
)
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(step, variable, values, name, bad):
    """The weights, momenta, averages, accumulators, the count of iterations: bit for bit."""
    weights = [variable(1.0), variable(-2.0)]
    optimizer = LossScaleOptimizer(INNER[name](), 8)
    step(optimizer, weights, [[0.5], [0.25]])
    before = values(optimizer, weights)
    step(optimizer, weights, [[0.5], [bad]])
    for old, new in zip(before, values(optimizer, weights), strict=True):
        np.testing.assert_array_equal(old, new)
    assert optimizer.skipped_steps == 1


def test_what_follows_a_skipped_step_is_what_would_have_been_without_it(step, variable, values):
    results = []
    for sequence in ([1.0, 2.0, 3.0], [1.0, np.nan, 2.0, np.inf, 3.0]):
        weights = [variable(1.0)]
        optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.1), 8)
        for gradient in sequence:
            step(optimizer, weights, [[gradient]])
        results.append(values(optimizer, weights))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_scale_stops_at_its_floor_and_weights_survive(step, variable):
    """Keras halves for ever: 200 bad steps make the scale 0, and the next good one NaN weights."""
    weights = [variable(1.0)]
    optimizer = LossScaleOptimizer("sgd", DynamicLossScale(patience=1000))
    for _ in range(40):
        step(optimizer, weights, [[np.nan]])
    assert optimizer.loss_scale.current_loss_scale == 1.0
    step(optimizer, weights, [[0.0]])
    np.testing.assert_array_equal(weights[0].numpy(), [1.0])


def test_the_scale_stops_at_its_ceiling_and_comes_down_again(step, variable):
    """Keras doubles for ever: once infinite, every step is skipped."""
    weights = [variable(1.0)]
    scale = DynamicLossScale(initial_scale=2.0**120, max_scale=2.0**122, growth_interval=1)
    optimizer = LossScaleOptimizer("sgd", scale)
    for _ in range(6):
        step(optimizer, weights, [[0.0]])
    assert scale.current_loss_scale == 2.0**122
    step(optimizer, weights, [[np.inf]])
    assert scale.current_loss_scale == 2.0**121
    assert optimizer.skipped_steps == 1


def test_a_fixed_scale_skips_too(step, variable):
    """An infinite gradient under Keras' loss_scale_factor makes the weight infinite."""
    weights = [variable(1.0)]
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale=1024)
    step(optimizer, weights, [[np.inf]])
    step(optimizer, weights, [[1.0]])
    np.testing.assert_array_equal(weights[0].numpy(), [0.5])
    assert optimizer.loss_scale == FixedLossScale(1024)


def test_iterations_and_schedules_count_updates_not_attempts(step, variable):
    """As in Keras 3: Adam's bias correction must know how many updates its moments have seen."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(schedule), 8)
    weights = [variable(1.0)]
    for gradient in (1.0, np.nan, np.nan, 1.0):
        step(optimizer, weights, [[gradient]])
    assert int(optimizer.iterations) == int(optimizer.inner_optimizer.iterations) == 2
    assert optimizer.skipped_steps == 2
    assert float(optimizer.learning_rate) == pytest.approx(0.125)
    np.testing.assert_allclose(weights[0].numpy(), [1 - 0.5 - 0.25])


def test_the_first_update_of_adam_is_right_after_skipped_ones(step, variable):
    """Its size is the learning rate, whatever was skipped before."""
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.1, epsilon=1e-12), 8)
    weights = [variable(1.0)]
    for gradient in (np.inf, np.inf, np.inf, 3.0):
        step(optimizer, weights, [[gradient]])
    np.testing.assert_allclose(weights[0].numpy(), [0.9], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("style", ["guide", "keras"])
def test_16_bit_gradients_are_unscaled_in_float32(variable, dtype, style):
    """2**-26 is no float16: dividing in float16 would make it zero."""
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=2.0**20)
    weights = [variable(0.0)]
    optimizer.scale_loss(1.0)
    grads = [ops.cast(ops.convert_to_tensor(np.float32([2.0**-6])), dtype)]
    if style == "guide":
        grads = optimizer.get_unscaled_gradients(grads)
        assert keras.backend.standardize_dtype(grads[0].dtype) == "float32"
    optimizer.apply(grads, weights)
    np.testing.assert_array_equal(weights[0].numpy(), [-(2.0**-26)])


def test_a_float16_loss_is_scaled_in_float32():
    """2 * 32768 is past 65504, where float16 ends."""
    optimizer = LossScaleOptimizer("sgd")
    loss = ops.convert_to_tensor(2.0, dtype="float16")
    for scaled in (optimizer.get_scaled_loss(loss), optimizer.scale_loss(loss + 0)):
        assert float(scaled) == 65536.0
        assert keras.backend.standardize_dtype(scaled.dtype) == "float32"


def test_a_callable_loss_gives_a_callable():
    optimizer = LossScaleOptimizer("sgd", loss_scale=8)
    scaled = optimizer.get_scaled_loss(lambda: ops.convert_to_tensor(2.0))
    assert float(scaled()) == 16.0


@pytest.mark.parametrize(
    "make",
    [
        keras.optimizers.SGD,
        keras.optimizers.Adam,
        keras.optimizers.AdamW,
        keras.optimizers.RMSprop,
        keras.optimizers.Adagrad,
        keras.optimizers.Nadam,
        keras.optimizers.Lion,
    ],
)
def test_float16_variables_are_updated(make):
    """Pure float16: gradients come in float16, are unscaled in float32, and end in the weight."""
    weight = keras.Variable(np.ones(2, "float16"), dtype="float16")
    optimizer = LossScaleOptimizer(make(0.25), loss_scale=8)
    optimizer.scale_loss(1.0)
    optimizer.apply([ops.convert_to_tensor(np.float16([8.0, 8.0]))], [weight])
    assert keras.backend.standardize_dtype(weight.dtype) == "float16"
    assert (weight.numpy() < 1).all()


def test_a_variable_without_a_gradient_stays(variable):
    weights = [variable(1.0), variable(2.0)]
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), 8)
    optimizer.build(weights)
    optimizer.scale_loss(1.0)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([np.float32([8.0]), None], weights)
    assert [float(w.numpy()[0]) for w in weights] == [0.5, 2.0]


def test_gradients_given_by_the_user_are_not_changed(variable):
    optimizer = LossScaleOptimizer("sgd", 8)
    gradient = ops.convert_to_tensor(np.float32([8.0]))
    optimizer.scale_loss(1.0)
    optimizer.apply([gradient], [variable(1.0)])
    np.testing.assert_array_equal(ops.convert_to_numpy(gradient), [8.0])


def test_without_a_loss_scale_nothing_is_scaled_and_nothing_skipped(variable):
    for none in (None, NoLossScale()):
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=none)
        weights = [variable(1.0)]
        assert float(optimizer.scale_loss(2.0)) == 2.0
        optimizer.apply([np.float32([0.5])], weights)
        assert float(weights[0].numpy()[0]) == 0.5
        optimizer.apply([np.float32([np.inf])], weights)
        assert float(weights[0].numpy()[0]) == -np.inf
        assert optimizer.loss_scale is None


def test_it_ends_with_an_error_that_names_the_variables(variable):
    weights = [variable(1.0), keras.Variable(np.ones((2, 3), "float32"), name="kernel")]
    optimizer = LossScaleOptimizer("sgd", DynamicLossScale(initial_scale=2, patience=3))
    for _ in range(2):
        optimizer.scale_loss(1.0)
        optimizer.apply([np.ones(1, "float32"), np.full((2, 3), np.nan, "float32")], weights)
    optimizer.scale_loss(1.0)
    with pytest.raises(LossScaleExhausted, match=r"kernel \(2, 3\)\. Look") as caught:
        optimizer.apply([np.ones(1, "float32"), np.full((2, 3), np.nan, "float32")], weights)
    assert "3 steps in a row" in str(caught.value)
    np.testing.assert_array_equal(weights[0].numpy(), [1.0])


def test_the_end_of_a_scale_can_be_asked_for(step, variable, backend):
    weights = [variable(1.0)]
    optimizer = LossScaleOptimizer("sgd", FixedLossScale(8, patience=3))
    optimizer.check_loss_scale()
    step(optimizer, weights, [[np.nan]])
    step(optimizer, weights, [[np.nan]])
    optimizer.check_loss_scale()
    optimizer.check_loss_scale([variable.value for variable in optimizer.variables])
    optimizer.bad_steps.assign(3)
    with pytest.raises(LossScaleExhausted, match="loss scale at 8"):
        optimizer.check_loss_scale()
    with pytest.raises(LossScaleExhausted, match="loss scale at 8"):
        optimizer.check_loss_scale([variable.value for variable in optimizer.variables])


def test_a_graph_that_only_skips_stops_by_itself(variable, backend):
    """Nothing looks at the state of a compiled loop of one's own, so the graph does, at last."""
    if backend != "tensorflow":
        pytest.skip("the others have no graph that can stop")
    import tensorflow as tf

    weights = [variable(1.0)]
    optimizer = LossScaleOptimizer("sgd", DynamicLossScale(1, patience=8))
    optimizer.build(weights)

    @tf.function(autograph=False)
    def run():
        optimizer.apply([optimizer.scale_loss(tf.constant([np.nan]))], weights)

    optimizer.bad_steps.assign(8 + 128 - 2)
    run()
    with pytest.raises(tf.errors.InvalidArgumentError, match="LossScaleExhausted"):
        run()
    np.testing.assert_array_equal(weights[0].numpy(), [1.0])
