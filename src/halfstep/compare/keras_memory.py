"""What training a Keras model needs of memory, by backend and device.

*torch*: as a torch recipe. *JAX*: XLA's plan of the compiled training step, exact. *TensorFlow*: on
a GPU the allocator's peak; on the CPU the resident set of a new process for each measurement, which
takes seconds to start, and cannot be forked: its threads are there as soon as it is imported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras

from . import memory
from .frameworks import Policies
from .recipe import Recipe

if TYPE_CHECKING:
    from .keras_trainee import Starter

Measure = Callable[[Recipe, "Starter", Policies, str, int, int], Iterator[dict[str, Any]]]


def measure(
    recipe: Recipe, start: Starter, policies: Policies, device: str, seed: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Yield measurements; see :func:`halfstep.compare.memory.measure`."""
    by_backend = _MEASURES[keras.backend.backend()]
    yield from by_backend(recipe, start, policies, device, seed, steps)


def _torch(
    recipe: Recipe, start: Starter, policies: Policies, device: str, seed: int, steps: int
) -> Iterator[dict[str, Any]]:
    from .torch_trainee import measure_on_cuda

    on_cuda = device.startswith("cuda")
    run = measure_on_cuda if on_cuda else memory.measure_in_children
    yield from run(recipe, policies, device, seed, steps)


def _jax(
    recipe: Recipe, start: Starter, policies: Policies, device: str, seed: int, steps: int
) -> Iterator[dict[str, Any]]:
    from .jax_trainee import METHOD, planned
    from .keras_trainee import first_batch

    batch = first_batch(recipe, seed)
    for label, policy in policies.items():
        try:
            plan = _plan(start(policy), batch, seed)
        except Exception as error:  # noqa: BLE001 - the run itself will say more about it
            yield {"policy": label, "error": f"{type(error).__name__}: {error}", "method": METHOD}
            continue
        yield {"policy": label, **planned(plan)}


def _plan(trainee: Any, batch: Any, seed: int) -> Any:
    """XLA's plan of the step that ``fit`` compiles; like that one it gives its state away."""
    import jax

    trainee.step(batch, seed)  # Keras makes its metrics in the first step
    model = trainee.model
    state = model._get_jax_state(
        trainable_variables=True, non_trainable_variables=True, optimizer_variables=True,
        metrics_variables=True,
    )  # fmt: skip
    step = jax.jit(model.train_step, donate_argnums=0)
    weights = batch[2] if len(batch) == 3 else None
    return step.lower(state, (batch[0], batch[1], weights)).compile().memory_analysis()


def _tensorflow(
    recipe: Recipe, start: Starter, policies: Policies, device: str, seed: int, steps: int
) -> Iterator[dict[str, Any]]:
    if device == "cpu":
        yield from memory.measure_in_children(recipe, policies, device, seed, steps, forks=False)
        return
    import tensorflow as tf

    name, method = f"GPU:{device.partition(':')[2] or 0}", "peak of TensorFlow's GPU allocator"
    for label, policy in policies.items():
        gc.collect()
        before = tf.config.experimental.get_memory_info(name)["current"]
        tf.config.experimental.reset_memory_stats(name)
        try:
            memory.train(recipe, policy, device, seed, steps)
        except Exception as error:  # noqa: BLE001 - the run itself will say more about it
            yield {"policy": label, "error": f"{type(error).__name__}: {error}", "method": method}
            continue
        peak = tf.config.experimental.get_memory_info(name)["peak"] - before
        yield {"policy": label, "bytes": int(peak), "method": method}


_MEASURES: dict[str, Measure] = {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow}
