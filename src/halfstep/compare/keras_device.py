"""Devices and threads of Keras, each by what its backend knows of them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import keras

from ..errors import RecipeError


@dataclass(frozen=True)
class Backend:
    """What is asked of a backend of Keras.

    Attributes:
        pick_device: as a trainer's.
        describe: as a trainer's.
        threads: as a trainer's.
    """

    pick_device: Callable[[str | None], str]
    describe: Callable[[str], dict[str, Any]]
    threads: Callable[[int | None], AbstractContextManager[None]]


def _of(module: ModuleType) -> Backend:
    return Backend(module.pick_device, module.describe, module.threads)


def _torch() -> Backend:
    from . import torch_device

    return _of(torch_device)


def _jax() -> Backend:
    from . import jax_device

    return _of(jax_device)


def _tensorflow() -> Backend:
    return Backend(_pick_with_tensorflow, _describe_with_tensorflow, _threads_of_tensorflow)


_BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": _torch,
    "jax": _jax,
    "tensorflow": _tensorflow,
}


def backend() -> Backend:
    """Return what is asked of the backend that Keras runs on.

    Raises:
        RecipeError: a backend that does not train.
    """
    name = keras.backend.backend()
    if name not in _BACKENDS:
        raise RecipeError(
            f"Keras runs on {name!r}, which does not train. Set KERAS_BACKEND to one of "
            f"{', '.join(_BACKENDS)}."
        )
    return _BACKENDS[name]()


def pick_device(name: str | None = None) -> str:
    """Return the device to train on: the one given, else the fastest that the backend has.

    Raises:
        RecipeError: a device that the backend does not have here.
    """
    return backend().pick_device(name)


def describe(device: str) -> dict[str, Any]:
    """Return what the report says about Keras, its backend and the device, as plain values."""
    told = backend().describe(device)
    return {**told, "versions": {"keras": keras.__version__, **told["versions"]}}


def threads(count: int | None) -> AbstractContextManager[None]:
    """Compute with so many CPU threads meanwhile; None leaves them as they are.

    Raises:
        RecipeError: the backend cannot be limited, or not any more.
    """
    return backend().threads(count)


def device_scope(device: str) -> AbstractContextManager[Any]:
    """Make and train models on a device, by the name that :func:`pick_device` gives it.

    On Keras' own choice nothing is done: a scope around ``"cpu:0"`` on torch breaks its dropout
    (Keras 3.15.1).
    """
    if device == pick_device():
        return nullcontext()
    kind, _, number = device.partition(":")
    name = "gpu" if kind == "cuda" else kind
    scope: AbstractContextManager[Any] = keras.device(f"{name}:{number}" if number else name)
    return scope


def _pick_with_tensorflow(name: str | None) -> str:
    import tensorflow as tf

    count = len(tf.config.list_physical_devices("GPU"))
    wanted = name or ("cuda:0" if count else "cpu")
    kind, _, number = wanted.partition(":")
    if wanted == "cpu" or (kind in ("cuda", "gpu") and int(number or 0) < count):
        return wanted
    raise RecipeError(
        f"--device {wanted}: TensorFlow cannot use it here: it sees the CPU and {count} GPU(s)."
    )


def _describe_with_tensorflow(device: str) -> dict[str, Any]:
    import tensorflow as tf

    told: dict[str, Any] = {"versions": {"tensorflow": tf.__version__}}
    if device == "cpu":
        count = tf.config.threading.get_intra_op_parallelism_threads()
        name = platform.processor() or platform.machine()
        return {**told, "device_name": name, "threads": count or None}
    gpu = tf.config.list_physical_devices("GPU")[int(device.partition(":")[2] or 0)]
    return {**told, "device_name": tf.config.experimental.get_device_details(gpu)["device_name"]}


@contextmanager
def _threads_of_tensorflow(count: int | None) -> Iterator[None]:
    import tensorflow as tf

    if count is not None:
        try:
            tf.config.threading.set_intra_op_parallelism_threads(count)
            tf.config.threading.set_inter_op_parallelism_threads(count)
        except RuntimeError as error:
            raise RecipeError(
                f"--threads {count}: TensorFlow takes a number of threads before it computes "
                f"anything, and it has: {error}"
            ) from None
    yield
