"""The memory of a few training steps on a CPU: the peak of a child process's resident set.

An allocator's peak is not to be had there, the resident set is. A program of its own
(:mod:`halfstep.compare.memory`) imports the recipe once and runs ``setup``, then forks a child
process for every measurement, so that nothing one policy leaves behind counts for the next. A child
notes its resident set before the model is made, resets the peak (``/proc/self/clear_refs``), trains
a few steps and reports the peak above that. Code that the system reads in from libraries on first
use is no memory of the training: the growth of the file-backed part (``RssFile``) is left out.
Where there is no fork or no ``/proc``, every measurement is a process of its own, and the peak is
``resource.ru_maxrss``. A resident set is a rough measure. Each policy is measured several times,
and the spread says how small a difference can be told from noise.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import HalfstepError
from .trainee import Policies, Starter

PROGRAM = f"{__package__}.memory"
"""What is started, by its name: it knows every framework, and nothing here does."""

REPEATS = 3
"""Measurements of each policy on a CPU."""

TIMEOUT = 300
"""Seconds after which measuring on a CPU is given up."""


def measure_in_children(
    start: Starter, policies: Policies, steps: int, *, forks: bool = True
) -> Iterator[dict[str, Any]]:
    """Start the program, once where it can fork, else once for each measurement.

    It forks after the recipe was imported.

    Args:
        start: what is trained, and how; its device is the CPU.
        policies: by their labels.
        steps: of one measurement.
        forks: False where what trains it does not survive a fork.
    """
    in_turn = [[label] for label in policies]
    rounds = [list(policies)] if forks and _can_fork() else in_turn * REPEATS
    for labels in rounds:
        job = {
            "recipe": str(start.recipe.file),
            "device": start.device,
            "seed": start.seed,
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
        [sys.executable, "-m", PROGRAM],
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


def _can_fork() -> bool:
    return sys.platform == "linux" and Path("/proc/self/status").exists()


def report_of_fork(train: Callable[[], None]) -> dict[str, Any]:
    """Run a measurement in a forked child and return what it wrote into a pipe."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, json.dumps(report(train)).encode())
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


def report(train: Callable[[], None]) -> dict[str, Any]:
    """Run a measurement in this process and return it, without its label."""
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
