"""Data-parallel training: one replica's bad gradient skips the step on all, and all stay equal."""

from __future__ import annotations

import keras

DDP = """
import sys
import keras, numpy as np, torch, torch.distributed as dist
from halfstep.keras import LossScaleOptimizer
from torch.nn.parallel import DistributedDataParallel

def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype="mixed_float16")])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9))
    optimizer.build(model.trainable_variables)
    parallel = DistributedDataParallel(model)
    scales = []
    for step in range(4):
        parallel.zero_grad()
        x = np.full((2, 2), rank + 1.0, "float32")
        if step == 1 and rank == 1:
            x[0] = np.nan
        loss = (parallel(torch.tensor(x)).float() ** 2).mean() / 1024
        optimizer.scale_loss(loss).backward()
        optimizer.apply([v.value.grad for v in model.trainable_variables])
        scales.append(optimizer.loss_scale.current_loss_scale)
    mine = torch.cat([v.value.detach().flatten() for v in model.trainable_variables])
    mine = torch.cat([mine, torch.tensor(scales)])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both), both
    assert torch.isfinite(mine).all()
    assert scales == [2.0**15, 2.0**14, 2.0**14, 2.0**14], scales
    assert optimizer.skipped_steps == 1 and int(optimizer.iterations) == 3
    if rank == 0:
        print("equal")
    dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    import os
    child = os.fork()
    work(1 if child == 0 else 0, port)
    if child:
        assert os.waitpid(child, 0)[1] == 0
"""

MIRRORED = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, numpy as np
from halfstep.keras import DynamicLossScale, LossScaleOptimizer, Policy
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype="mixed_float16")])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9))
    optimizer.build(model.trainable_variables)

def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.cast(model(x), tf.float32) ** 2) / 1024
        scaled = optimizer.scale_loss(loss)
    grads = tape.gradient(scaled, model.trainable_variables)
    optimizer.apply_gradients(zip(grads, model.trainable_variables))

def together(values):
    strategy.run(step, args=(values,))

def run(together):
    scales = []
    for number in range(4):
        def data(context, number=number):
            replica = context.replica_id_in_sync_group
            # the second replica only: the first one's own gradients are finite
            bad = number == 1 and replica == 1
            return tf.fill((2, 2), np.nan if bad else replica + 1.0)
        together(strategy.experimental_distribute_values_from_function(data))
        scales.append(optimizer.loss_scale.current_loss_scale)
    for variable in [*model.trainable_variables, *optimizer.variables]:
        first, *others = strategy.experimental_local_results(variable.value)
        for other in others:
            np.testing.assert_array_equal(first.numpy(), other.numpy())
        assert np.isfinite(first.numpy()).all()
    return scales

assert run(tf.function(together)) == [2.0**15, 2.0**14, 2.0**14, 2.0**14]
assert run(together) == [2.0**14, 2.0**13, 2.0**13, 2.0**13]
assert optimizer.skipped_steps == 2 and optimizer.iterations.numpy() == 6

# small enough that only what is planted is not finite
policy = Policy("mixed_float16", loss_scale=DynamicLossScale(2**8))
with strategy.scope():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype=policy)])
    model.compile(keras.optimizers.SGD(0.01), "mse")
x = np.ones((8, 2), "float32")
x[7] = np.nan
model.fit(x, np.ones((8, 1)), batch_size=4, shuffle=False, verbose=0)
assert model.optimizer.skipped_steps == 1 and model.optimizer.iterations.numpy() == 1
print("equal")
"""

DATA_PARALLEL = """
import jax, keras, numpy as np
from halfstep.keras import DynamicLossScale, LossScaleOptimizer, Policy
assert len(jax.devices()) == 8
keras.distribution.set_distribution(keras.distribution.DataParallel(devices=jax.devices()))
# small enough that only what is planted is not finite
policy = Policy("mixed_float16", loss_scale=DynamicLossScale(2**8))
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype=policy)])
model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
assert type(model.optimizer) is LossScaleOptimizer
x = np.ones((32, 2), "float32")
x[9] = np.nan  # in the first batch of 16, on one device alone
model.fit(x, np.ones((32, 1)), batch_size=16, shuffle=False, verbose=0)
assert model.optimizer.skipped_steps == 1 and int(model.optimizer.iterations) == 1
assert model.optimizer.loss_scale.current_loss_scale == 2.0**7
for variable in [*model.trainable_variables, *model.optimizer.variables]:
    shards = [np.asarray(shard.data) for shard in variable.value.addressable_shards]
    assert len(shards) == 8, variable.path
    for shard in shards:
        np.testing.assert_array_equal(shard, shards[0])
    assert np.isfinite(shards[0]).all()
print("equal")
"""

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
PROGRAMS = {
    "torch": (DDP, {"OMP_NUM_THREADS": "1"}),
    "tensorflow": (MIRRORED, {}),
    "jax": (DATA_PARALLEL, EIGHT),
}


def test_a_bad_gradient_on_one_replica_skips_the_step_on_all(run_python):
    program, environment = PROGRAMS[keras.backend.backend()]
    assert run_python(program, **environment).endswith("equal\n")
