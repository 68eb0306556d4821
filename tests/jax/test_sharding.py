"""Eight devices: automatic and explicit sharding, and shard_map, in a process of their own."""

from __future__ import annotations

import json

import pytest

START = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from halfstep.jax import autocast
assert len(jax.devices()) == 8
w = jax.random.normal(jax.random.key(0), (16, 16)) / 4
x = jax.random.normal(jax.random.key(1), (8, 16))

def check(found, expected, dtype=jnp.float32, most=0.02):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert all(leaf.dtype == dtype for leaf in found)
    a, b = (np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in (found, expected))
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert 0 < error < most, error

def low_products(function, *args, names=("dot_general",)):
    found, seen = [], [jax.make_jaxpr(function)(*args).jaxpr]
    while seen:
        for e in seen.pop().eqns:
            if e.primitive.name in names:
                found.append(e.invars[0].aval.dtype == jnp.bfloat16)
            for v in e.params.values():
                seen += [getattr(b, "jaxpr", b) for b in (v if isinstance(v, tuple) else (v,))
                         if hasattr(b, "eqns") or hasattr(b, "jaxpr")]
    return sum(found), len(found)

def loss(w, x):
    return (jnp.tanh(jax.nn.relu(x @ w) @ w) ** 2).mean()

expected = jax.value_and_grad(loss)(w, x)
"""

AUTOMATIC = """
mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
rows, columns = NamedSharding(mesh, P("d")), NamedSharding(mesh, P(None, "m"))
xs, ws = jax.device_put(x, rows), jax.device_put(w, columns)
check(jax.jit(jax.value_and_grad(autocast(loss)))(ws, xs), expected)

def constrained(w, x):
    product = jax.jit(lambda x, w: x @ w, in_shardings=(rows, columns),
                      out_shardings=NamedSharding(mesh, P("d", "m")))
    y = jax.lax.with_sharding_constraint(product(x, w), rows)
    return (jnp.tanh(jax.nn.relu(y) @ w) ** 2).mean()

for function in (jax.value_and_grad(autocast(constrained)),
                 autocast(jax.value_and_grad(constrained))):
    check(jax.jit(function)(ws, xs), expected)
    low, every = low_products(function, ws, xs)
    assert low == every
    assert str(jax.make_jaxpr(function)(ws, xs)).count("sharding_constraint") >= 2
"""

EXPLICIT = """
mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
with jax.set_mesh(mesh):
    xs, ws = jax.device_put(x, P("d")), jax.device_put(w, P(None, "m"))
    def explicit(w, x):
        y = jax.sharding.reshard(jax.nn.relu(jnp.dot(x, w, out_sharding=P("d", "m"))), P("d"))
        return (jnp.tanh(jnp.dot(y, w, out_sharding=P("d", "m"))) ** 2).mean()
    for function in (jax.value_and_grad(autocast(explicit)),
                     autocast(jax.value_and_grad(explicit))):
        check(jax.jit(function)(ws, xs), expected)
        assert jax.typeof(jax.jit(function)(ws, xs)[1]).sharding.spec == P(None, "m")
"""

MAPPED = """
mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
ws = jnp.stack([w] * 3)

def body(ws, x):
    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(jax.nn.relu(x @ w) @ w), None
    return jax.lax.pmean((jax.lax.scan(layer, x, ws)[0] ** 2).mean(), "d")

for check_vma in (True, False):
    def mapped(f):
        return jax.shard_map(f, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(),
                             check_vma=check_vma)
    wanted = jax.value_and_grad(mapped(body))(ws, x)
    functions = [jax.value_and_grad(autocast(mapped(body))),
                 jax.value_and_grad(mapped(autocast(body))),
                 autocast(jax.value_and_grad(mapped(body)))]
    for function in functions if check_vma else functions[:1]:
        check(jax.jit(function)(ws, x), wanted, most=0.04)
        low, every = low_products(function, ws, x)
        assert low == every, (low, every)
        # the gradient of a weight that every device holds is summed over them in float32
        low, every = low_products(function, ws, x, names=("psum", "psum_invariant"))
        assert low == 0 < every - 1, (low, every)

# what is only used in 16 bits travels in 16 bits
def gathered(w, x):
    return jax.lax.all_gather(w, "d", tiled=True)[:, :16] @ x
sent = jax.shard_map(gathered, mesh=mesh, in_specs=(P("d"), P()), out_specs=P(), check_vma=False)
text = str(jax.make_jaxpr(autocast(sent))(w, w))
line = next(line for line in text.splitlines() if "= all_gather[" in line)
assert "bf16[" in line, line
"""


PARTS = {"auto": AUTOMATIC, "explicit": EXPLICIT, "mapped": MAPPED}

RUN = """
import json, traceback
def run(code):
    try:
        exec(code, dict(globals()))
    except Exception:
        return traceback.format_exc()[-4000:]
print(json.dumps({name: run(code) for name, code in PARTS.items()}))
"""


@pytest.fixture(scope="module")
def failures(on_eight_devices):
    """What went wrong in each part; one process runs all of them."""
    return json.loads(on_eight_devices(f"{START}\nPARTS = {PARTS!r}\n{RUN}"))


@pytest.mark.parametrize("part", PARTS)
def test_on_eight_devices(failures, part):
    assert failures[part] is None, failures[part]
