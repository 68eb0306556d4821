"""JAX models: each as its framework's users write it, with a loss of parameters and a batch.

``by_hand`` is the same model with the framework's own switch for 16 bits (``dtype=`` of Flax),
where it has one. Nothing here knows halfstep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 64, 4, 4, 16, 4

Loss = Callable[[Any, Any], jax.Array]


@dataclass(frozen=True)
class Model:
    """A model, ready to be trained.

    Attributes:
        params: float32 parameters.
        loss: of parameters and a batch; with ``statistics`` a pair of it and the new statistics.
        batch: one batch.
        by_hand: the same loss in bfloat16 by the framework's own switch.
        has_aux: whether the loss returns a pair.
    """

    params: Any
    loss: Callable[..., Any]
    batch: Any
    by_hand: Callable[..., Any] | None = None
    has_aux: bool = False


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross entropy, in float32."""
    logits = logits.astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def tokens(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Token sequences with something to learn: each token follows from the one before."""
    start = jax.random.randint(jax.random.key(seed), (BATCH, 1), 0, VOCABULARY)
    text = (start + 7 * jnp.arange(LENGTH + 1)) % VOCABULARY
    return text[:, :-1], text[:, 1:]


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention as many models hold it, NumPy scalar and all."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    causal = np.tri(q.shape[1], dtype=bool)
    scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def linen(dtype: Any = None, remat: bool = False) -> tuple[Any, Loss]:
    """A pre-norm transformer of Flax linen with scanned layers."""
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
            dense = partial(nn.DenseGeneral, dtype=dtype)
            y = nn.LayerNorm(dtype=dtype)(x)
            q, k, v = (dense((HEADS, WIDTH // HEADS), name=name)(y) for name in "qkv")
            x = x + dense(WIDTH, axis=(-2, -1), name="out")(attention(q, k, v))
            y = dense(4 * WIDTH, name="up")(nn.LayerNorm(dtype=dtype)(x))
            return x + dense(WIDTH, name="down")(nn.gelu(y)), None

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, text: jax.Array) -> jax.Array:
            x = nn.Embed(VOCABULARY, WIDTH, name="embed")(text)
            block = nn.remat(Block, prevent_cse=False) if remat else Block
            layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
            )
            x, _ = layers(name="layers")(x, None)
            return nn.Dense(VOCABULARY, dtype=dtype, name="head")(nn.LayerNorm(dtype=dtype)(x))

    net = Transformer()
    return net, lambda params, batch: cross_entropy(net.apply(params, batch[0]), batch[1])


def linen_model(remat: bool = False) -> Model:
    """The linen transformer."""
    net, loss = linen(remat=remat)
    batch = tokens()
    params = net.init(jax.random.key(0), batch[0])
    return Model(params, loss, batch, linen(jnp.bfloat16, remat)[1])


def nnx_model() -> Model:
    """The same with Flax nnx, its layers scanned too."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, dtype: Any, rngs: Any) -> None:
            linear = partial(nnx.LinearGeneral, dtype=dtype, rngs=rngs)
            head = (HEADS, WIDTH // HEADS)
            self.norm1 = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
            self.norm2 = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
            self.q, self.k, self.v = (linear(WIDTH, head) for _ in range(3))
            self.out = linear(head, WIDTH, axis=(-2, -1))
            self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

        def __call__(self, x: jax.Array) -> jax.Array:
            y = self.norm1(x)
            x = x + self.out(attention(self.q(y), self.k(y), self.v(y)))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Transformer(nnx.Module):
        def __init__(self, dtype: Any, rngs: Any) -> None:
            @nnx.split_rngs(splits=LAYERS)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def blocks(rngs: Any) -> Block:
                return Block(dtype, rngs)

            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.blocks = blocks(rngs)
            self.norm = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
            self.head = nnx.Linear(WIDTH, VOCABULARY, dtype=dtype, rngs=rngs)

        def __call__(self, text: jax.Array) -> jax.Array:
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def layers(x: jax.Array, block: Block) -> jax.Array:
                return block(x)

            return self.head(self.norm(layers(self.embed(text), self.blocks)))

    def split(dtype: Any) -> tuple[Loss, Any]:
        graph, params = nnx.split(Transformer(dtype, nnx.Rngs(0)))

        def loss(params: Any, batch: Any) -> jax.Array:
            return cross_entropy(nnx.merge(graph, params)(batch[0]), batch[1])

        return loss, params

    loss, params = split(None)
    return Model(params, loss, tokens(), split(jnp.bfloat16)[0])


def equinox_model() -> Model:
    """A classifier of Equinox: attention, layer norms, an MLP."""
    import equinox as eqx

    class Classifier(eqx.Module):
        attention: Any
        norm: Any
        mlp: Any

        def __init__(self, key: jax.Array) -> None:
            keys = jax.random.split(key)
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
            self.norm = eqx.nn.LayerNorm(WIDTH)
            self.mlp = eqx.nn.MLP(WIDTH, 10, 2 * WIDTH, 2, key=keys[1])

        def __call__(self, x: jax.Array) -> jax.Array:
            y = jax.vmap(self.norm)(x)
            return self.mlp((x + self.attention(y, y, y)).mean(0))

    model = Classifier(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))

    def loss(params: Any, batch: Any) -> jax.Array:
        net = eqx.combine(params, static)
        return cross_entropy(jax.vmap(net)(batch[0]), batch[1])

    return Model(params, loss, (x, jnp.arange(BATCH)))


def plain_model() -> Model:
    """Plain JAX: a dictionary of arrays and a scan."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "in": jax.random.normal(keys[0], (8, WIDTH)) / 3,
        "up": jax.random.normal(keys[1], (LAYERS, WIDTH, 2 * WIDTH)) / 6,
        "down": jax.random.normal(keys[2], (LAYERS, 2 * WIDTH, WIDTH)) / 8,
        "out": jax.random.normal(keys[3], (WIDTH, 1)) / 6,
    }
    x = jax.random.normal(jax.random.key(1), (BATCH * LENGTH, 8))
    target = jnp.sin(x.sum(1, keepdims=True))

    def loss(params: Any, batch: Any) -> jax.Array:
        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            up, down = weights
            norm = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
            return x + jax.nn.silu(norm @ up) @ down, None

        x, _ = jax.lax.scan(layer, batch[0] @ params["in"], (params["up"], params["down"]))
        return ((x @ params["out"] - batch[1]) ** 2).mean()

    return Model(params, loss, (x, target))


def convnet_model() -> Model:
    """Two convolutions with batch norm and pooling, of Flax linen; it returns new statistics."""
    from flax import linen as nn

    def build(dtype: Any) -> Any:
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                for features in (8, 16):
                    x = nn.Conv(features, (3, 3), dtype=dtype)(x)
                    x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=dtype)(x))
                    x = nn.max_pool(x, (2, 2), (2, 2))
                return nn.Dense(10, dtype=dtype)(x.reshape(x.shape[0], -1))

        return Net()

    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    labels = jnp.arange(8)
    variables = build(None).init(jax.random.key(0), x)

    def loss_of(net: Any) -> Callable[..., Any]:
        def loss(params: Any, batch: Any) -> tuple[jax.Array, Any]:
            x, labels, statistics = batch
            logits, new = net.apply(
                {"params": params, "batch_stats": statistics}, x, mutable=["batch_stats"]
            )
            return cross_entropy(logits, labels), new["batch_stats"]

        return loss

    return Model(
        variables["params"], loss_of(build(None)), (x, labels, variables["batch_stats"]),
        loss_of(build(jnp.bfloat16)), has_aux=True,
    )  # fmt: skip


MODELS: dict[str, Callable[[], Model]] = {
    "linen transformer, scanned": linen_model,
    "the same, checkpointed": partial(linen_model, remat=True),
    "nnx transformer, scanned": nnx_model,
    "equinox classifier": equinox_model,
    "plain JAX, scanned": plain_model,
    "convnet with batch norm": convnet_model,
}
"""Every model by the name that the tables give it."""
