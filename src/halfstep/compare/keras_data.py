"""What a Keras recipe need not say: batches and metrics, from the arrays of its ``data()``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import RecipeError
from .recipe import Recipe

BATCH_SIZE = 32
"""The batch size of a recipe that names none, as ``fit`` has it."""


class Data(NamedTuple):
    """What ``data()`` returns: arrays, or tuples and dicts of them, by example."""

    x_train: Any
    y_train: Any
    x_test: Any
    y_test: Any


_loaded: WeakKeyDictionary[ModuleType, Data] = WeakKeyDictionary()


def data_of(recipe: Recipe) -> Data:
    """Return a recipe's data, as NumPy arrays; it is asked for once.

    Raises:
        RecipeError: ``data`` returned something else, or parts of different lengths.
    """
    if recipe.module not in _loaded:
        found = recipe.call("data")
        if not isinstance(found, (tuple, list)) or len(found) != len(Data._fields):
            raise RecipeError(
                f"{recipe.file}: data() returned {type(found).__name__}; it must return "
                f"({', '.join(Data._fields)})."
            )
        data = Data(*map(_arrays, found))
        for x, y, what in ((data[0], data[1], "train"), (data[2], data[3], "test")):
            if len(sizes := {len(array) for array in (*_leaves(x), *_leaves(y))}) != 1:
                raise RecipeError(
                    f"{recipe.file}: data() returned x_{what} and y_{what} of {sorted(sizes)} "
                    "examples; they must have as many."
                )
        _loaded[recipe.module] = data
    return _loaded[recipe.module]


def batches(recipe: Recipe, epoch: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """The training examples in a new order each epoch; the last, smaller batch is left out."""
    data, size = data_of(recipe), batch_size(recipe)
    count = len(_leaves(data.y_train)[0])
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for start in range(0, count - size + 1, size):
        rows = order[start : start + size]
        yield _rows(data.x_train, rows), _rows(data.y_train, rows)


def evaluate(recipe: Recipe, model: Any) -> dict[str, float]:
    """What ``model.evaluate`` says about the test examples.

    Of an accuracy it is known what it is a share of.
    """
    data = data_of(recipe)
    metrics: dict[str, float] = model.evaluate(
        data.x_test, data.y_test, batch_size=max(batch_size(recipe), 128), verbose=0,
        return_dict=True,
    )  # fmt: skip
    if "accuracy" in str(recipe.constant("METRIC", next(iter(metrics)))):
        metrics["examples"] = len(_leaves(data.y_test)[0])
    return metrics


def batch_size(recipe: Recipe) -> int:
    """``BATCH_SIZE``, else that of ``fit``."""
    return int(recipe.constant("BATCH_SIZE", BATCH_SIZE))


def _arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _arrays(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_arrays, value))
    return np.atleast_1d(np.asarray(value))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, tuple):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]


def _rows(value: Any, rows: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rows(each, rows) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(each, rows) for each in value)
    return value[rows]
