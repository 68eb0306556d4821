"""Scale once, unscale once: both ways to write a step are right, and mixing them up is told."""

from __future__ import annotations

import copy
import threading
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from halfstep.errors import LossScaleError, LossScaleWarning
from halfstep.keras import LossScaleOptimizer

NEVER = "no loss was scaled since the last step"


def sgd(scale=8):
    return LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=scale)


def array(*values):
    return ops.convert_to_tensor(np.float32(values))


def number(weight):
    return float(weight.numpy()[0])


def test_gradients_that_were_never_scaled_are_told(variable):
    """Keras takes a step of 3e-6 instead of 0.1, and says nothing."""
    weight = variable(1.0)
    with pytest.warns(LossScaleWarning, match=NEVER) as caught:
        sgd().apply([array(0.1)], [weight])
    assert caught[0].filename == __file__
    with pytest.warns(LossScaleWarning, match=NEVER):
        sgd().apply_gradients([(array(0.1), weight)])
    with pytest.warns(LossScaleWarning, match="get_unscaled_gradients: " + NEVER):
        sgd().get_unscaled_gradients([array(0.1)])


def test_each_step_is_scaled_anew(variable):
    optimizer, weight = sgd(), variable(1.0)
    optimizer.scale_loss(array(1.0))
    optimizer.apply([array(8.0)], [weight])
    with pytest.warns(LossScaleWarning, match=NEVER):
        optimizer.apply([array(8.0)], [weight])


@pytest.mark.parametrize("first", ["scale_loss", "get_scaled_loss"])
@pytest.mark.parametrize("second", ["scale_loss", "get_scaled_loss"])
def test_a_loss_is_scaled_once(first, second):
    optimizer = sgd()
    scaled = getattr(optimizer, first)(array(1.0))
    with pytest.raises(LossScaleError, match="scaled already"):
        getattr(optimizer, second)(scaled)


def test_two_losses_of_one_step_may_both_be_scaled(variable):
    optimizer, weight = sgd(), variable(1.0)
    for loss in (array(1.0), array(2.0)):
        optimizer.scale_loss(loss)
    optimizer.apply([array(8.0)], [weight])
    assert number(weight) == 0.0


def test_gradients_are_unscaled_once():
    optimizer = sgd()
    optimizer.scale_loss(array(1.0))
    grads = optimizer.get_unscaled_gradients([array(8.0)])
    with pytest.raises(LossScaleError, match="divided by the loss scale already"):
        optimizer.get_unscaled_gradients(grads)


def test_gradients_may_be_unscaled_in_parts(variable):
    optimizer, weights = sgd(), [variable(1.0), variable(1.0)]
    optimizer.scale_loss(array(1.0))
    one = optimizer.get_unscaled_gradients([array(8.0)])
    other = optimizer.get_unscaled_gradients([array(16.0)])
    optimizer.apply([*one, *other], weights)
    assert [number(weight) for weight in weights] == [0.0, -1.0]


def test_unscaled_gradients_may_be_changed(step, variable):
    """Clipped, the arrays are new ones; they are unscaled all the same."""
    optimizer, weight = sgd(), variable(1.0)
    optimizer.get_scaled_loss(array(1.0))
    (gradient,) = optimizer.get_unscaled_gradients([array(8.0)])
    optimizer.apply([ops.clip(gradient, -0.5, 0.5)], [weight])
    assert number(weight) == 0.5


def test_gradients_unscaled_for_a_look_may_be_applied_as_they_were(variable):
    """Keras' way, with a look at the norm: what went in is still scaled, and divided once."""
    optimizer, weight, gradient = sgd(), variable(1.0), array(8.0)
    optimizer.scale_loss(array(1.0))
    optimizer.get_unscaled_gradients([gradient])
    optimizer.apply([gradient], [weight])
    assert number(weight) == 0.0


def test_scaled_and_unscaled_gradients_are_not_applied_together(variable):
    optimizer, scaled = sgd(), [array(8.0), array(8.0)]
    optimizer.scale_loss(array(1.0))
    unscaled = optimizer.get_unscaled_gradients(scaled)
    with pytest.raises(LossScaleError, match="1 of these gradients went into"):
        optimizer.apply([scaled[0], unscaled[1]], [variable(1.0), variable(1.0)])


def test_the_next_step_after_the_guides_may_be_keras(step, variable):
    optimizer, weight = sgd(), variable(1.0)
    step(optimizer, [weight], [[0.25]], "guide")
    step(optimizer, [weight], [[0.25]], "keras")
    step(optimizer, [weight], [[0.25]], "guide")
    assert number(weight) == 0.25


def test_a_copy_stands_before_a_step(variable):
    optimizer = sgd()
    optimizer.scale_loss(array(1.0))
    pairing = copy.deepcopy(optimizer._pairing)
    assert pairing.stage.name == "IDLE"


def test_threads_have_steps_of_their_own(variable):
    optimizer, weight = sgd(), variable(1.0)
    optimizer.build([weight])
    optimizer.scale_loss(array(1.0))
    told = []

    def other():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.apply([array(8.0)], [weight])
            told.extend(str(warning.message) for warning in caught)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert [NEVER in message for message in told] == [True]


def test_a_step_cut_by_a_compiled_function_is_right_every_time(backend, variable):
    """Scaled and unscaled inside of it, applied outside: from the second run on unseen."""
    if backend == "torch":
        pytest.skip("this backend compiles nothing here")
    optimizer, weight = sgd(), variable(1.0)
    optimizer.build([weight])

    def unscaled_gradients(own=None):
        scaled = optimizer.get_scaled_loss(array(1.0), own)
        return optimizer.get_unscaled_gradients([0.25 * scaled], own)[0]

    if backend == "jax":
        import jax

        compiled = jax.jit(unscaled_gradients)
        run = lambda: compiled([variable.value for variable in optimizer.variables])  # noqa: E731
    else:
        import tensorflow as tf

        run = tf.function(unscaled_gradients, autograph=False)
    for _ in range(3):
        optimizer.apply([run()], [weight])
    assert number(weight) == 0.25


def test_jit_does_not_freeze_the_scale(backend, variable):
    """In Keras a jitted loss keeps the first scale: after two halvings steps are 4x too big."""
    if backend != "jax":
        pytest.skip("only JAX freezes what a function reads")
    import jax

    optimizer, weight = LossScaleOptimizer("sgd"), variable(1.0)
    optimizer.build([weight])

    @jax.jit
    def frozen(loss):
        return optimizer.scale_loss(loss)

    with pytest.raises(LossScaleError, match="jit would freeze"):
        frozen(1.0)
    with pytest.raises(LossScaleError, match="use stateless_apply"):
        jax.jit(lambda grads: optimizer.apply(grads, [weight]))([array(1.0)])
    with pytest.raises(LossScaleError, match="Build the optimizer before"):
        jax.jit(LossScaleOptimizer("sgd").scale_loss)(1.0)

    live = jax.jit(optimizer.scale_loss)
    before = [variable.value for variable in optimizer.variables]
    assert float(live(1.0, before)) == 2.0**15
    optimizer.dynamic_scale.assign(8.0)
    assert float(live(1.0, [variable.value for variable in optimizer.variables])) == 8.0
    # jax.grad alone runs each time, and freezes nothing
    assert float(jax.grad(lambda x: optimizer.scale_loss(x * 1.0))(2.0)) == 8.0


def test_a_step_that_jax_compiles_has_no_callback_and_no_branch(backend, variable):
    if backend != "jax":
        pytest.skip("the rule is about JAX")
    import jax

    optimizer, weight = LossScaleOptimizer(keras.optimizers.Adam(0.1)), variable(1.0)
    optimizer.build([weight])
    own = [variable.value for variable in optimizer.variables]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossScaleWarning)
        program = str(jax.make_jaxpr(optimizer.stateless_apply)(own, [array(1.0)], [array(1.0)]))
    assert "callback" not in program
    assert "cond[" not in program
    assert "while[" not in program
    assert "select_n" in program
