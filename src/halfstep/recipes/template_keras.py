"""My recipe: two spirals, told apart by a small network in Keras.

Run it:    halfstep compare THIS_FILE --html result.html
Look:      halfstep explain THIS_FILE
Then change it, function by function, into your own training run. The same functions are run once
under each policy: it is the global policy while make_model() runs.
"""

from __future__ import annotations

import os
from typing import Any

# "torch", "jax" or "tensorflow"; it must be said before Keras is imported.
os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers

FRAMEWORK = "keras"

# How long to train when the command gives neither --steps nor --epochs. STEPS works as well.
EPOCHS = 10

# Of the batches that are drawn from data(). 32 if it is left out, as in fit().
BATCH_SIZE = 64

# Which metric counts, and whether more of it is better.
METRIC = "accuracy"
HIGHER_IS_BETTER = True

# Two results count as the same when they differ by no more than this share of the first one. It
# is not used here: of an accuracy it is known how many examples it is a share of, and then one
# binomial standard error decides.
SAME_WITHIN = 0.01

_points: np.ndarray
_labels: np.ndarray


def setup(seed: int, device: str) -> str | None:
    """Optional. Runs once, before anything else.

    Return a string to have it shown with the result, or None.
    """
    global _points, _labels
    draw = np.random.default_rng(seed)
    angle = draw.random(2000) * 9
    _labels = draw.integers(0, 2, 2000)
    turned = angle + np.pi * _labels
    spirals = np.stack([angle * np.cos(turned), angle * np.sin(turned)], axis=1) / 5
    _points = spirals.astype("float32")
    return None


def make_model() -> Any:
    """Return a new model, compiled. compile() scales the loss by itself where the policy asks.

    Random weights are fine: every policy starts from the same ones. Give the last layer
    dtype="float32", so that the loss sees what it computes unrounded.
    """
    model = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(64, activation="silu"),
            layers.Dense(64, activation="silu"),
            layers.Dense(2),
            layers.Softmax(dtype="float32"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return x_train, y_train, x_test, y_test. It is called once.

    The metrics are those of model.evaluate(x_test, y_test).
    """
    return _points[:1600], _labels[:1600], _points[1600:], _labels[1600:]


# Instead of data(), or beside it, for batches and metrics of your own:
#
# def batches(epoch, seed):
#     """Yield (x, y) or (x, y, sample_weight), the same ones for the same arguments."""
#
# def evaluate(model):
#     """Return numbers by name; "examples": how many examples METRIC is a share of."""
