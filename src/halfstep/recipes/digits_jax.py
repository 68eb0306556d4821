"""A small transformer in plain JAX reads scikit-learn's handwritten digits.

Each image of 8x8 pixels is a sequence of its 16 patches of 2x2. Data and split are those of
``digits_mlp``: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, as
``sklearn.datasets.load_digits`` ships them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FRAMEWORK = "jax"
TITLE = "Handwritten digits, transformer in plain JAX"
EPOCHS = 8
METRIC = "accuracy"
HIGHER_IS_BETTER = True
BATCH, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


@cache
def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training patches, test patches (N, 16, 4) in -1..1, training labels, test labels."""
    digits = load_digits()
    rows = digits.images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4)
    patches = (rows.reshape(-1, 16, 4) / 8 - 1).astype(np.float32)
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=450, stratify=digits.target, random_state=0
    )
    return patches[train], patches[test], digits.target[train], digits.target[test]


@jax.jit  # one compilation, not one for each shape
def init(key: jax.Array) -> Any:
    """Normal weights with the variance of one over their inputs; the layers' are stacked."""
    shapes = {
        "embed": (4, WIDTH),
        "place": (16, WIDTH),
        "head": (WIDTH, 10),
        "layers": {
            "qkv": (LAYERS, WIDTH, 3 * WIDTH),
            "out": (LAYERS, WIDTH, WIDTH),
            "up": (LAYERS, WIDTH, 4 * WIDTH),
            "down": (LAYERS, 4 * WIDTH, WIDTH),
        },
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            jax.random.normal(one, shape) * shape[-2] ** -0.5
            for one, shape in zip(keys, leaves, strict=True)
        ],
    )


def norm(x: Any) -> Any:
    """Divide by the root mean square of the features."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def attention(x: Any, qkv: Any, out: Any) -> Any:
    """Every patch looks at every patch."""
    q, k, v = jnp.split((x @ qkv).reshape(*x.shape[:-1], HEADS, -1), 3, axis=-1)
    return jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ out


def apply(params: Any, patches: Any) -> Any:
    """Logits (N, 10) of patches (N, 16, 4)."""

    def layer(x: Any, weights: Any) -> tuple[Any, None]:
        x = x + attention(norm(x), weights["qkv"], weights["out"])
        return x + jax.nn.gelu(norm(x) @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(layer, patches @ params["embed"] + params["place"], params["layers"])
    return norm(x).mean(1) @ params["head"]


def tx() -> optax.GradientTransformation:
    """AdamW with clipping, which sees unscaled gradients."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))


def batches(epoch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The training images in a new order each epoch; the last, smaller batch is left out."""
    patches, _, labels, _ = split()
    order = np.random.default_rng([seed, epoch]).permutation(len(labels))
    for rows in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
        yield patches[rows], labels[rows]


def loss(params: Any, batch: Any) -> Any:
    """Cross entropy, in nats."""
    patches, labels = batch
    logits = apply(params, patches)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def evaluate(params: Any) -> dict[str, Any]:
    """Accuracy and cross entropy on the 450 test images."""
    _, patches, _, labels = split()
    logits = apply(params, patches)
    return {
        "accuracy": (logits.argmax(1) == labels).mean(),
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
        "examples": len(labels),
    }
