"""autocast against what else there is for JAX, in one run: ``python -m benchmarks.jax_autocast``.

Each model is differentiated in float32, by ``halfstep.jax.autocast``, by hand (Flax's ``dtype=``),
by jmp and by MPX, the last two where they are installed (``pip install jmp
mixed-precision-for-jax``). Counts are those of the program that JAX traces, before XLA.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from halfstep.jax import DynamicLossScale, autocast, loss_scaled, scale_loss

from .jax_zoo import MODELS, Model
from .machine import describe, sentence, slug
from .tables import Table

ROOT = Path(__file__).resolve().parents[1]
PRODUCTS = ("dot_general", "conv_general_dilated")
LOW = ("bfloat16", "float16")
# the dtype of every matrix product and convolution in XLA's optimised program
COMPILED_PRODUCT = re.compile(r"= (f32|f16|bf16)\[[^=]* (?:dot|convolution)\(")
STEPS = 150
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
Gradient = Callable[[Any, Any], Any]


def by_float32(model: Model) -> Gradient:
    """The model as it is."""
    return _gradient(model, model.loss)


def by_autocast(model: Model) -> Gradient:
    """``halfstep.jax.autocast`` around the loss."""
    return _gradient(model, autocast(model.loss))


def by_hand(model: Model) -> Gradient | None:
    """The framework's own ``dtype=``."""
    return None if model.by_hand is None else _gradient(model, model.by_hand)


def by_jmp(model: Model) -> Gradient:
    """jmp, as its documentation does it: cast parameters and inputs, cast the output back."""
    import jmp

    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")

    def loss(params: Any, batch: Any) -> Any:
        found = model.loss(policy.cast_to_compute(params), policy.cast_to_compute(batch))
        return policy.cast_to_output(found)

    return _gradient(model, loss)


def by_mpx(model: Model) -> Gradient:
    """MPX's ``filter_grad``; the dtype is set as an object, its string form does nothing."""
    import mpx

    mpx.set_half_precision_datatype(jnp.bfloat16)
    # bfloat16 needs no scale, and 1 keeps its scaling out of the comparison
    scaling = mpx.DynamicLossScaling(jnp.asarray(1.0), jnp.asarray(1.0), period=2**30, factor=2)

    def gradient(params: Any, batch: Any) -> Any:
        return mpx.filter_grad(model.loss, scaling, has_aux=model.has_aux)(params, batch)[2]

    return gradient


WAYS: dict[str, Callable[[Model], Gradient | None]] = {
    "float32": by_float32,
    "autocast": by_autocast,
    "by hand": by_hand,
    "jmp": by_jmp,
    "MPX": by_mpx,
}


def _gradient(model: Model, loss: Callable[..., Any]) -> Gradient:
    def gradient(params: Any, batch: Any) -> Any:
        found = jax.grad(loss, has_aux=model.has_aux)(params, batch)
        return found[0] if model.has_aux else found

    return gradient


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those in bodies too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def _bytes(variables: Any) -> int:
    return sum(variable.aval.size * variable.aval.dtype.itemsize for variable in variables)


def measure(model: Model, gradient: Gradient, reference: Any) -> dict[str, Any]:
    """Count what a program holds, compile it, run it, and compare its gradient."""
    # a fresh function, traced anew: JAX remembers programs by function
    traced = jax.make_jaxpr(lambda params, batch: gradient(params, batch))
    program = [*equations(traced(model.params, model.batch).jaxpr)]
    dtypes = [
        {variable.aval.dtype.name for variable in equation.invars}
        for equation in program
        if equation.primitive.name in PRODUCTS
    ]
    scans = [_bytes(e.outvars) for e in program if e.primitive.name == "scan"]
    compiled = jax.jit(gradient).lower(model.params, model.batch).compile()
    found = compiled(model.params, model.batch)
    return {
        "low_products": sum(len(names) == 1 and names <= set(LOW) for names in dtypes),
        "products": len(dtypes),
        "casts": sum(e.primitive.name == "convert_element_type" for e in program),
        "edge_bytes": scans[0] if scans else None,
        "hlo_bytes": (compiled.cost_analysis() or {}).get("bytes accessed"),
        "error": _far(found, reference if reference is not None else found),
        "trace_ratio": _trace_ratio(model, gradient),
    }


def _measured(model: Model, gradient: Gradient, reference: Any) -> dict[str, Any]:
    """The figures, or why there are none: a way that does not run is a result too."""
    try:
        return measure(model, gradient, reference)
    except TypeError as error:
        lines = [line for line in str(error).splitlines() if "dtypes do not match" in line]
        if not lines:
            raise
        return {"fails": lines[0].strip()}


def _trace_ratio(model: Model, gradient: Gradient, rounds: int = 9) -> float:
    """Processor time to trace, against float32, turn by turn: the least of each counts."""

    def once(function: Gradient) -> float:
        jax.clear_caches()
        begin = time.process_time()
        # a fresh function: JAX remembers programs by function
        jax.jit(lambda params, batch: function(params, batch)).trace(model.params, model.batch)
        return time.process_time() - begin

    pairs = [(once(gradient), once(by_float32(model))) for _ in range(rounds)]
    return min(own for own, _ in pairs) / min(base for _, base in pairs)


def _far(one: Any, other: Any) -> float:
    a, b = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (one, other)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def models() -> dict[str, dict[str, Any]]:
    """Every model by every way that is installed."""
    results: dict[str, dict[str, Any]] = {}
    for name, make in MODELS.items():
        model = make()
        reference = by_float32(model)(model.params, model.batch)
        results[name] = {}
        for way, build in WAYS.items():
            try:
                gradient = build(model)
            except ImportError as missing:
                print(f"{way}: not installed ({missing})")
                continue
            if gradient is not None:
                results[name][way] = _measured(model, gradient, reference)
                print(f"{name}, {way}: {results[name][way]}")
    return results


def compiled_table() -> Table:
    """What the backend makes of the products; one without 16-bit units widens their operands."""
    rows = []
    for name, make in MODELS.items():
        model = make()
        for way in (by_autocast, by_hand):
            gradient = way(model)
            if gradient is None:
                continue
            text = jax.jit(gradient).lower(model.params, model.batch).compile().as_text()
            found = COMPILED_PRODUCT.findall(text)
            low = sum(dtype != "f32" for dtype in found)
            rows.append([name, way.__name__[3:], f"{low} of {len(found)}"])
    return Table(
        "Products in 16 bits in XLA's optimised program", ["model", "way", "products"], rows
    )


def train(seed: int, policy: str | None, steps: int = STEPS) -> dict[str, float]:
    """Train the scanned transformer; float16 starts from a scale that overflows."""
    from .jax_zoo import linen, tokens

    net, loss = linen()
    loss = loss if policy is None else autocast(loss, policy)
    scale = DynamicLossScale(initial_scale=2.0**24) if policy == "mixed_float16" else None
    tx = loss_scaled(optax.adam(3e-3), scale)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(lambda p: scale_loss(loss(p, batch), state))(params)
        updates, new = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new, value / state.loss_scale.scale

    params = net.init(jax.random.key(seed), tokens()[0])
    state, losses = tx.init(params), []
    for number in range(steps):
        params, state, value = step(params, state, tokens(1000 * seed + number))
        losses.append(float(value))
    return {
        "loss": statistics.fmean(losses[-20:]),
        "skipped": float(state.loss_scale.skipped_steps),
        "scale": float(state.loss_scale.scale),
    }


def training(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, list[dict[str, float]]]:
    """Three seeds under each policy."""
    policies = {
        "float32": None,
        "mixed_bfloat16": "mixed_bfloat16",
        "mixed_float16": "mixed_float16",
    }
    return {name: [train(seed, policy) for seed in seeds] for name, policy in policies.items()}


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or not base else f"{value / base:.2f}x"


def model_table(results: dict[str, dict[str, Any]]) -> Table:
    """The table of the models."""
    rows = []
    for name, ways in results.items():
        base = ways["float32"]
        for way, found in ways.items():
            if "fails" in found:
                rows.append(["", way, "does not run", *["-"] * 5])
                continue
            rows.append(
                [
                    name if way == "float32" else "",
                    way,
                    f"{found['low_products']} of {found['products']}",
                    str(found["casts"]),
                    _ratio(found["edge_bytes"], base["edge_bytes"]),
                    _ratio(found["hlo_bytes"], base["hlo_bytes"]),
                    f"{found['error']:.4f}" if way != "float32" else "-",
                    f"{found['trace_ratio']:.2f}x",
                ]
            )
    head = ["model", "way", "16-bit products", "casts", "scan edge", "HLO bytes", "gradient error",
            "tracing"]  # fmt: skip
    return Table("Gradients of JAX models in bfloat16", head, rows, words=2)


def training_table(results: dict[str, list[dict[str, float]]]) -> Table:
    """The table of the training runs."""
    rows = [
        [
            policy,
            *(f"{run['loss']:.4f}" for run in runs),
            ", ".join(f"{run['skipped']:.0f}" for run in runs),
            ", ".join(f"{run['scale']:g}" for run in runs),
        ]
        for policy, runs in results.items()
    ]
    head = ["policy", "seed 0", "seed 1", "seed 2", "skipped steps", "last scale"]
    return Table(f"Training loss, mean of the last 20 of {STEPS} steps", head, rows)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jax_autocast", description=__doc__)
    parser.add_argument(
        "--compiled", action="store_true", help="only say what XLA makes of the products"
    )
    if parser.parse_args().compiled:
        compiled_table().show()
        return
    machine = describe("cpu") | {"jax": jax.__version__}
    print(sentence(machine))
    found = {"machine": machine, "models": models(), "training": training()}
    path = ROOT / "benchmarks" / "results" / f"jax-{slug(machine)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables = model_table(found["models"]), training_table(found["training"])
    for table in tables:
        table.show()
    write_page(tables, f"{machine['device']}, jax {jax.__version__}, {machine['date']}")
    print(f"written: {path.relative_to(ROOT)}, docs/jax.md")


def write_page(tables: Sequence[Table], machine: str) -> None:
    """Put the tables between the two marks of the page."""
    page = ROOT / "docs" / "jax.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [f"{table.title} ({machine}):\n\n{table.markdown()}" for table in tables]
    page.write_text("\n\n".join((before + BEGIN, *parts, END + after)), encoding="utf-8")


if __name__ == "__main__":
    main()
