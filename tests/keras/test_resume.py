"""Save in mid-run, load in a fresh process whose global policy is float32, and go on."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from halfstep.keras import DynamicLossScale, Policy, policy_scope

# what the fresh process runs; each batch is one step
GO_ON = """
import keras
try:
    keras.saving.load_model("middle.keras")
    print("no error")
except Exception as error:
    print(error)
print("---")
import numpy as np
import halfstep.keras
assert keras.config.dtype_policy().name == "float32"
model = keras.saving.load_model("middle.keras")
data = np.load("data.npz")
for x, y in zip(data["x"][6:], data["y"][6:]):
    model.train_on_batch(x, y)
state = [*model.variables, *model.optimizer.variables]
np.savez("end.npz", *[variable.numpy() for variable in state])
print(type(model.optimizer).__module__, model.optimizer.loss_scale)
"""


@pytest.mark.filterwarnings("ignore::halfstep.errors.PolicyWarning")
def test_a_resumed_run_is_the_run_that_was_not_interrupted(run_python, tmp_path):
    """Weights, momenta, batch statistics, scale and counts: bit for bit, skipped steps and all."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 8, 4)).astype("float32"), random.normal(size=(12, 8, 1))
    x[[4, 9]] = np.nan
    policy = Policy("mixed_float16", loss_scale=DynamicLossScale(2.0**5, growth_interval=3))
    keras.utils.set_random_seed(0)
    with policy_scope(policy):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(4),
                keras.layers.LayerNormalization(),
                keras.layers.Dense(1),
            ]
        )
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.9)), "mse"
    )
    for step, (batch, target) in enumerate(zip(x, y, strict=True)):
        if step == 6:
            model.save(tmp_path / "middle.keras")
        model.train_on_batch(batch, target)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    without, found = run_python(GO_ON, **environment).split("---\n")
    assert "import halfstep.keras" in without
    assert found.startswith("halfstep.keras.optimizer DynamicLossScale(current_loss_scale=")
    assert model.optimizer.skipped_steps == 2
    end = np.load(tmp_path / "end.npz")
    state = [*model.variables, *model.optimizer.variables]
    assert len(end.files) == len(state)
    for name, variable in zip(end.files, state, strict=True):
        np.testing.assert_array_equal(end[name], variable.numpy(), err_msg=variable.path)
