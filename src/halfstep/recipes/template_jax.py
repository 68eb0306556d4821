"""My recipe: two spirals, told apart by a small network in JAX.

Run it:    halfstep compare THIS_FILE --html result.html
Look:      halfstep explain THIS_FILE
Then change it, function by function, into your own training run. Nothing here knows about
precision: the same functions are run once under each policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

FRAMEWORK = "jax"

# How long to train when the command gives neither --steps nor --epochs. STEPS works as well.
EPOCHS = 10

# Which number of evaluate() counts, and whether more of it is better.
METRIC = "accuracy"
HIGHER_IS_BETTER = True

# Two results count as the same when they differ by no more than this share of the first one. It
# is not used here: evaluate() says how many "examples" its accuracy is a share of, and then one
# binomial standard error decides.
SAME_WITHIN = 0.01

_points: np.ndarray
_labels: np.ndarray


def setup(seed: int, device: str) -> str | None:
    """Optional. Runs once, before anything else: load your data here.

    Return a string to have it shown with the result, or None.
    """
    global _points, _labels
    draw = np.random.default_rng(seed)
    angle = draw.random(2000) * 9
    _labels = draw.integers(0, 2, 2000)
    turned = angle + np.pi * _labels
    spirals = np.stack([angle * np.cos(turned), angle * np.sin(turned)], axis=1) / 5
    _points = spirals.astype(np.float32)
    return None


def init(key: jax.Array) -> Any:
    """Return the parameters: a pytree of float32 arrays. Every policy gets a copy of them.

    A model of Flax fits in as it is: `return net.init(key, example)`.
    """
    keys = jax.random.split(key, 3)
    shapes = [(2, 64), (64, 64), (64, 2)]
    return [
        (jax.random.normal(one, shape) * shape[0] ** -0.5, jnp.zeros(shape[1]))
        for one, shape in zip(keys, shapes, strict=True)
    ]


# Optional: `init_state(key)` returns what the model keeps without training it, such as the
# statistics of batch norm. Then it is `loss(params, state, batch)`, which returns a pair, the loss
# and the new state, and `evaluate(params, state)`.


def apply(params: Any, x: Any) -> Any:
    """Return logits. This is your own function; only loss() and evaluate() call it."""
    for weights, bias in params[:-1]:
        x = jax.nn.silu(x @ weights + bias)
    weights, bias = params[-1]
    return x @ weights + bias


def tx() -> optax.GradientTransformation:
    """Return an optax optimizer. Loss scaling is added around it."""
    return optax.adam(1e-2)


def batches(epoch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the training batches of one epoch, the same ones for the same arguments.

    A batch is an array, or any pytree of arrays; it is moved to the device for you.
    """
    order = np.random.default_rng([seed, epoch]).permutation(1600)
    for rows in order.reshape(-1, 64):
        yield _points[rows], _labels[rows]


def loss(params: Any, batch: Any) -> Any:
    """Return the training loss, a scalar. It is traced, differentiated and compiled for you.

    Random numbers, for instance for dropout: `def loss(params, batch, key)`, with a new key for
    each step, the same for every policy.
    """
    points, labels = batch
    logits = apply(params, points)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def evaluate(params: Any) -> dict[str, Any]:
    """Return numbers by name. Where JAX can trace it, it runs under the policy, else in float32.

    "examples" is optional: how many examples METRIC is a share of.
    """
    points, labels = _points[1600:], _labels[1600:]
    right = apply(params, points).argmax(1) == labels
    return {"accuracy": right.mean(), "examples": len(labels)}
