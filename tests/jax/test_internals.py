"""What of JAX is used beyond its documentation is still there, and behaves as it did."""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import halfstep.jax
from halfstep.jax import _internals as internals
from halfstep.jax.operations import OPERATIONS, STRUCTURE

MOVED = (
    f"jax {jax.__version__} is not what halfstep.jax was written for "
    f"({', '.join(internals.CHECKED_VERSIONS)}): "
)
X = jnp.ones((2, 2))


def first(function, *args):
    return jax.make_jaxpr(function)(*args).jaxpr.eqns[0]


BODIES = {
    "jit": (lambda: first(jax.jit(lambda x: x + 1), X), {"jaxpr", "in_shardings", "out_shardings"}),
    "scan": (
        lambda: first(lambda x: jax.lax.scan(lambda c, _: (c, c), x, None, 2), X),
        {"jaxpr", "num_consts", "num_carry", "length", "reverse", "unroll"},
    ),
    "while": (
        lambda: first(lambda x: jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c, x), X),
        {"cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"},
    ),
    "cond": (
        lambda: jax.make_jaxpr(lambda i, x: jax.lax.switch(i, [jnp.sin, jnp.cos], x))(1, X)
        .jaxpr.eqns[-1],
        {"branches"},
    ),
    "remat2": (lambda: first(jax.checkpoint(jnp.sin), X), {"jaxpr", "policy", "prevent_cse"}),
    "custom_jvp_call": (lambda: first(jax.nn.relu, X), {"call_jaxpr", "num_consts"}),
    "shard_map": (
        lambda: first(
            jax.shard_map(
                jnp.sin, mesh=jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
                in_specs=jax.P("d"), out_specs=jax.P("d"),
            ),
            X,
        ),
        {"jaxpr", "mesh", "in_specs", "out_specs", "newly_manual_axes", "check_vma"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_primitives_with_bodies_have_the_names_and_parameters_that_are_read(name):
    make, parameters = BODIES[name]
    equation = make()
    assert equation.primitive.name == name, MOVED + f"{name} is now {equation.primitive.name}"
    missing = parameters - set(equation.params)
    assert not missing, MOVED + f"{name} has no {missing} any more, but {set(equation.params)}"
    assert name in STRUCTURE


def test_custom_vjp_has_the_parameters_that_are_read():
    function = jax.custom_vjp(lambda x: x * 2)
    function.defvjp(lambda x: (x, None), lambda _, g: (g,))
    equation = first(function, X)
    assert equation.primitive.name == "custom_vjp_call", MOVED + equation.primitive.name
    assert {"call_jaxpr", "num_consts"} <= set(equation.params), MOVED + str(equation.params)


def test_equations_have_lines_scopes_and_a_context():
    def scoped(x):
        with jax.named_scope("outer"):
            return jax.grad(lambda x: jnp.sin(x).sum())(x)

    equation = first(scoped, X)
    stack = internals.name_stack(equation)
    assert internals.scope_names(stack) == ("outer",), MOVED + f"name stacks are {stack!r}"
    line = internals.user_line(equation)
    assert line.startswith("test_internals.py:"), MOVED + f"the line of an equation is {line!r}"
    with internals.standing_at(equation, stack):
        inner = first(jnp.cos, X)
    assert inner.primitive.name == "cos"


def test_programs_can_be_traced_from_abstract_values_and_opened():
    low = jax.typeof(X.astype(jnp.bfloat16))
    wide = internals.with_dtype(low, "float32")
    assert (wide.dtype, wide.shape) == (jnp.float32, (2, 2)), MOVED + "avals cannot be updated"
    captured = jnp.arange(4.0).reshape(2, 2)
    opened, constants = internals.without_constants(
        internals.trace(lambda x: [x @ captured], [wide])
    )
    assert len(opened.invars) == 1 + len(constants), MOVED + "constants of programs"
    assert not opened.constvars


def test_symbolic_zeros_become_zeros():
    zero = jax.custom_derivatives.SymbolicZero(jax.typeof(X))
    made = internals.zeros_of(zero)
    assert (made.shape, made.dtype) == ((2, 2), jnp.float32), MOVED + "zeros of symbolic zeros"
    assert not made.any()


def test_a_reference_is_no_array_of_float32():
    def refers(x):
        ref = jax.new_ref(x)
        return ref[...]

    made = first(refers, X)
    assert not internals.is_float32(made.outvars[0].aval), MOVED + "references look like arrays"
    assert internals.is_float32(made.invars[0].aval)


def test_every_primitive_on_the_lists_exists():
    # a primitive that JAX renames would silently become opaque; those of extra packages load late
    import jax.experimental.pallas  # noqa: F401
    from jax._src import pjit  # noqa: F401
    from jax._src.interpreters import mlir

    known = {primitive.name for primitive in mlir._lowerings}
    known |= {primitive.name for rules in mlir._platform_specific_lowerings.values()
              for primitive in rules}  # fmt: skip
    known |= {"pallas_call", "eig", "schur", "hessenberg", "get", "swap", "addupdate", "new_ref"}
    known |= {"pure_callback", "io_callback", "debug_callback", "debug_print", "run_state"}
    missing = OPERATIONS.names - known
    assert not missing, MOVED + f"it has no primitives {sorted(missing)}"


def test_only_one_file_reaches_into_jax():
    package = Path(halfstep.jax.__file__).parent
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            reaching = [
                n for n in names if n.startswith(("jax._src", "jax.extend", "jax.interpreters"))
            ]
            assert not reaching or path.name == "_internals.py", path.name


def test_importing_the_door_brings_neither_torch_nor_optax():
    import subprocess
    import sys

    code = "import halfstep.jax, sys; print(sorted({'torch', 'optax', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
