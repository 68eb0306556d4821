"""A small convolutional network in Keras reads scikit-learn's handwritten digits.

It runs on the backend of Keras that ``KERAS_BACKEND`` names, on torch if it names none. Data and
split are those of ``digits_mlp``: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten
Digits", UCI, 1998, as ``sklearn.datasets.load_digits`` ships them.
"""

from __future__ import annotations

import os
from typing import Any

# before Keras is imported
os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FRAMEWORK = "keras"
TITLE = "Handwritten digits, a small convolutional network in Keras"
EPOCHS = 6
BATCH_SIZE = 64
METRIC = "accuracy"
HIGHER_IS_BETTER = True


def make_model() -> Any:
    """Patches of 2x2, a layer over all of them, ten probabilities in float32."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 2, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dropout(0.1),
            layers.Dense(10),
            layers.Softmax(dtype="float32"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """1347 training images (N, 8, 8, 1) in 0..1 and labels, 450 test images and labels."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype("float32")
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=450, stratify=digits.target, random_state=0
    )
    return images[train], digits.target[train], images[test], digits.target[test]
