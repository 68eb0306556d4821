"""How much memory a few training steps need, under each policy on its own.

What it is depends on the framework and the device, and every measurement says what it is:

*torch on CUDA*: the allocator's peak (``torch.cuda.max_memory_allocated``) over a few steps of one
model, above what was allocated before the model was made.

*torch on the CPU*: an allocator's peak is not to be had, the resident set is. This file is a
program for that (``python -m halfstep.compare.memory``): it imports the recipe once and runs
``setup``, then forks a child process for every measurement, so that nothing one policy leaves
behind counts for the next. A child notes its resident set before the model is made, resets the peak
(``/proc/self/clear_refs``), trains a few steps and reports the peak above that. Code that the
system reads in from libraries on first use is no memory of the training: the growth of the
file-backed part (``RssFile``) is left out. Where there is no fork or no ``/proc``, every
measurement is a process of its own, and the peak is ``resource.ru_maxrss``. A resident set is a
rough measure. Each policy is measured several times, and the spread says how small a difference
can be told from noise.

*Keras*: as its backend, see ``keras_memory``.

*JAX*: XLA plans every buffer of the compiled training step in advance; the plan is exact and the
same each time (``measure_memory`` in ``jax_trainee``). A process's resident set would mostly be the
compiler's.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ..core.policy import Policy, PolicyMap
from ..errors import HalfstepError
from .engine import Plan
from .frameworks import Policies, framework_of
from .policies import policy_from_config
from .recipe import Recipe, load_recipe

STEPS = 3
"""Steps of one measurement: the second is the first one with the optimizer's state in place."""

REPEATS = 3
"""Measurements of each policy on a CPU."""

TIMEOUT = 300
"""Seconds after which measuring on a CPU is given up."""


def measure(
    recipe: Recipe, policies: Policies, device: str, seed: int = 0, steps: int = STEPS
) -> Iterator[dict[str, Any]]:
    """Yield one measurement after the other, as plain values.

    Yields:
        ``{"policy": label, "bytes": int, "method": str}``, or with ``"error"`` instead of
        ``"bytes"`` where a policy could not be measured.
    """
    start = framework_of(recipe).trainer().starter(recipe, device, seed)
    yield from start.measure_memory(policies, steps)


def train(recipe: Recipe, policy: Policy | PolicyMap, device: str, seed: int, steps: int) -> None:
    """Train a new model for a few steps."""
    trainee = framework_of(recipe).trainer().starter(recipe, device, seed)(policy)
    plan = Plan(steps=steps, seed=seed)
    for step, (_, batch) in enumerate(islice(plan.batches(recipe), steps)):
        trainee.step(batch, plan.step_seed(step))


def measure_in_children(
    recipe: Recipe, policies: Policies, device: str, seed: int, steps: int, *, forks: bool = True
) -> Iterator[dict[str, Any]]:
    """Start the program below, once where it can fork, else once for each measurement.

    It forks after the recipe was imported.

    Args:
        recipe: what is trained.
        policies: by their labels.
        device: the CPU, by the framework's name of it.
        seed: of weights and batches.
        steps: of one measurement.
        forks: False where what trains it does not survive a fork.
    """
    in_turn = [[label] for label in policies]
    rounds = [list(policies)] if forks and _can_fork() else in_turn * REPEATS
    for labels in rounds:
        job = {
            "recipe": str(recipe.file),
            "device": device,
            "seed": seed,
            "steps": steps,
            "threads": _torch_threads() if forks else None,
            "forks": forks and _can_fork(),
            "repeats": REPEATS if forks and _can_fork() else 1,
            "policies": {label: policies[label].get_config() for label in labels},
        }
        yield from _run_program(job)


def _run_program(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    # a session of its own: Ctrl-C reaches this process, and it ends the others
    program = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, complaint = program.communicate(json.dumps(job), timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        out, complaint = "", f"measuring memory took more than {TIMEOUT} seconds"
    finally:
        if program.poll() is None:
            os.killpg(program.pid, 9)
            program.communicate()
    found = [json.loads(line) for line in out.splitlines()]
    yield from found
    reason = (complaint.strip().splitlines() or ["the measuring process ended early"])[-1]
    for label in job["policies"]:
        if not any(item["policy"] == label for item in found):
            yield {"policy": label, "error": reason, "method": "resident set"}


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _set_torch_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def _can_fork() -> bool:
    return sys.platform == "linux" and Path("/proc/self/status").exists()


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
    measure_here = _in_fork if job["forks"] else _report
    for _ in range(job["repeats"]):
        for label, policy in policies.items():

            def few_steps(policy: Policy | PolicyMap = policy) -> None:
                _set_torch_threads(job["threads"])
                train(recipe, policy, job["device"], job["seed"], job["steps"])

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


def _in_fork(train: Callable[[], None]) -> dict[str, Any]:
    """Run a measurement in a forked child and return what it wrote into a pipe."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, json.dumps(_report(train)).encode())
        finally:
            os._exit(0)  # no clean-up of the parent's things here
    os.close(write_end)
    with os.fdopen(read_end, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {"error": f"the measuring process died with status {status}", "method": ""}
    found: dict[str, Any] = json.loads(text)
    return found


def _report(train: Callable[[], None]) -> dict[str, Any]:
    try:
        peak, method = _peak_of(train)
    except HalfstepError as error:
        return {"error": str(error), "method": "resident set"}
    except Exception as error:  # noqa: BLE001 - whatever the policy makes a model raise: the run will say more
        return {"error": f"{type(error).__name__}: {error}", "method": "resident set"}
    return {"bytes": peak, "method": method}


def _peak_of(train: Callable[[], None]) -> tuple[int, str]:
    """Return the peak resident memory above the present one while ``train`` runs, in bytes."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _peak_from_proc(train), "peak resident set of a child process"
    return _peak_from_rusage(train), "peak resident set of a child process (ru_maxrss)"


def _peak_from_proc(train: Callable[[], None]) -> int:
    before = _proc_status()
    train()
    after = _proc_status()
    code = max(0, after["RssFile"] - before["RssFile"])
    return max(0, after["VmHWM"] - before["VmRSS"] - code)


def _proc_status() -> dict[str, int]:
    """The memory lines of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {key.rstrip(":"): int(kilobytes) * 1024 for key, kilobytes, _ in pairs}


def _peak_from_rusage(train: Callable[[], None]) -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train()
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


if __name__ == "__main__":
    main()
