"""How much memory a few training steps need: the program that measures it on a CPU.

What it is depends on the framework and the device, and every measurement says what it is:

*torch on CUDA*: the allocator's peak (``torch.cuda.max_memory_allocated``) over a few steps of one
model, above what was allocated before the model was made (``torch_memory``).

*torch on the CPU*: the peak of a child process's resident set (``resident_memory``). This file is
the program that is started for that, ``python -m halfstep.compare.memory``.

*Keras*: as its backend, see ``keras_memory``.

*JAX*: XLA plans every buffer of the compiled training step in advance; the plan is exact and the
same each time (``jax_memory``). A process's resident set would mostly be the compiler's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from ..core.policy import Policy, PolicyMap
from .engine import train
from .loading import load_recipe
from .policies import policy_from_config
from .resident_memory import report, report_of_fork
from .trainers import trainer_of


def _set_torch_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def main() -> None:
    """Read a job from the standard input, write one line of JSON for each measurement."""
    job = json.loads(sys.stdin.read())
    # what a recipe prints must not land between the results
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # a pool of OpenMP threads does not survive a fork; one thread needs no pool
    _set_torch_threads(1 if job["forks"] else job["threads"])
    recipe = load_recipe(job["recipe"])
    recipe.call("setup", job["seed"], job["device"])
    policies = {label: policy_from_config(config) for label, config in job["policies"].items()}
    _IMPORT_ALL[recipe.framework]()
    measure_here = report_of_fork if job["forks"] else report
    for _ in range(job["repeats"]):
        for label, policy in policies.items():

            def few_steps(policy: Policy | PolicyMap = policy) -> None:
                _set_torch_threads(job["threads"])
                seed, trainer = job["seed"], trainer_of(recipe)
                # nobody keeps the starter meanwhile: its weights would count
                trainee = trainer.starter(recipe, job["device"], seed)(policy)
                train(trainee, recipe, seed, job["steps"])

            results.write(json.dumps({"policy": label, **measure_here(few_steps)}) + "\n")
            results.flush()


def _import_torch() -> None:
    """Train a model of a few numbers, so that what torch imports at its first step is there.

    That is about 60 MiB of Python, which would be counted as the memory of the first model.
    """
    import torch

    import halfstep.torch as door

    model = door.apply_policy(torch.nn.Linear(2, 2), "mixed_float16")
    optimizer = door.LossScaleOptimizer(torch.optim.Adam(model.parameters()))
    optimizer.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()


def _import_keras() -> None:
    """The same for Keras and its backend."""
    import keras

    import halfstep.keras as door

    with door.policy_scope("mixed_float16"):
        layers = [keras.Input((2,)), keras.layers.Dense(2), keras.layers.Softmax(dtype="float32")]
        model = keras.Sequential(layers)
    model.compile("adam", "mse")
    ones = keras.ops.ones((1, 2))
    model.train_on_batch(ones, ones)


_IMPORT_ALL: dict[str, Callable[[], None]] = {"torch": _import_torch, "keras": _import_keras}


if __name__ == "__main__":
    main()
