"""What training a Keras model needs of memory, by backend and device.

*torch*: as a torch recipe. *JAX*: XLA's plan of the compiled training step, exact. *TensorFlow*: on
a GPU the allocator's peak; on the CPU the resident set of a new process for each measurement, which
takes seconds to start, and cannot be forked: its threads are there as soon as it is imported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import keras

from .engine import first_batch, train
from .resident_memory import measure_in_children
from .trainee import Policies, Starter

Measure = Callable[[Starter, Policies, int], Iterator[dict[str, Any]]]


def measure(start: Starter, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
    """Yield measurements, as a starter's ``measure_memory`` does."""
    yield from _MEASURES[keras.backend.backend()](start, policies, steps)


def _torch(start: Starter, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
    from .torch_memory import measure_on_cuda

    on_cuda = start.device.startswith("cuda")
    run = measure_on_cuda if on_cuda else measure_in_children
    yield from run(start, policies, steps)


def _jax(start: Starter, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
    from .jax_memory import METHOD, planned

    batch = first_batch(start.recipe, start.seed)
    for label, policy in policies.items():
        try:
            plan = _plan(start(policy), batch, start.seed)
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


def _tensorflow(start: Starter, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
    if start.device == "cpu":
        yield from measure_in_children(start, policies, steps, forks=False)
        return
    import tensorflow as tf

    name = f"GPU:{start.device.partition(':')[2] or 0}"
    method = "peak of TensorFlow's GPU allocator"
    for label, policy in policies.items():
        gc.collect()
        before = tf.config.experimental.get_memory_info(name)["current"]
        tf.config.experimental.reset_memory_stats(name)
        try:
            train(start.anew()(policy), start.recipe, start.seed, steps)
        except Exception as error:  # noqa: BLE001 - the run itself will say more about it
            yield {"policy": label, "error": f"{type(error).__name__}: {error}", "method": method}
            continue
        peak = tf.config.experimental.get_memory_info(name)["peak"] - before
        yield {"policy": label, "bytes": int(peak), "method": method}


_MEASURES: dict[str, Measure] = {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow}
