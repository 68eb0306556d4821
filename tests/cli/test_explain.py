"""halfstep explain: what a policy does to a recipe's model, on the terminal."""

import json
import os

import pytest
from click.testing import CliRunner

from halfstep.cli.group import halfstep

TORCH = """
from torch import nn, optim
def make_model(): return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
def make_optimizer(model): return optim.SGD(model.parameters(), lr=0.1)
def batches(epoch, seed): return []
def loss(model, batch): return model(batch).mean()
def evaluate(model): return {}
"""

JAX = """
import jax, numpy as np, optax
FRAMEWORK = "jax"
def setup(seed, device):
    global x
    x = np.full((2, 3), seed, np.float32)
def init(key): return jax.numpy.ones((3, 4))
def tx(): return optax.sgd(0.1)
def batches(epoch, seed): yield x
def loss(params, batch):
    with jax.named_scope("head"):
        y = batch @ params
    return jax.numpy.exp(y).sum()
def evaluate(params): return {}
"""

NOTHING = JAX.replace("y = batch @ params", "y = batch.sum() + params")


@pytest.fixture
def at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "cpu")
    for name, text in {"t": TORCH, "j": JAX, "n": NOTHING}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(halfstep, ["explain", *arguments], prog_name="halfstep")


def test_a_jax_recipe_is_explained_operation_by_operation(at):
    pytest.importorskip("jax")
    result = run("j.py", "--policy", "mixed_float16", "--seed", "1")
    assert result.exit_code == 0, result.output
    product = next(line for line in result.output.splitlines() if "dot_general" in line)
    assert product.split()[:5] == ["j.py:12", "head", "dot_general", "2x4", "float16"]
    assert "exp" in result.output
    assert "on the deny list" in result.output
    assert "matrix products in float16: 1 of 1, 100.0 %" in result.output


def test_a_torch_recipe_is_explained_layer_by_layer(at):
    result = run("t.py")
    assert result.exit_code == 0, result.output
    assert "LayerNorm" in result.output
    assert "bfloat16 in and out, float32 statistics" in result.output


def test_a_policy_map_comes_from_a_file(at):
    pytest.importorskip("jax")
    overrides = {"head": {"name": "float32"}, "haed": {"name": "float32"}}
    for name, keys in {"good": ["head"], "bad": ["haed"]}.items():
        chosen = {key: overrides[key] for key in keys}
        config = {"default": {"name": "mixed_bfloat16"}, "overrides": chosen}
        (at / f"{name}.json").write_text(json.dumps(config))
    good, bad = run("j.py", "--policy", "good.json"), run("j.py", "--policy", "bad.json")
    assert good.exit_code == 2  # the only product was kept
    assert "nothing" in good.output
    assert bad.exit_code == 2
    assert "Did you mean 'head'" in bad.output


def test_an_error_in_the_recipe_is_said_with_its_line(at):
    pytest.importorskip("jax")
    (at / "b.py").write_text(JAX.replace("global x", "1 / 0"))
    result = run("b.py")
    assert result.exit_code == 2
    assert "b.py, line 5: setup(0, 'cpu'): ZeroDivisionError" in " ".join(result.output.split())


def test_the_table_is_all_there_is(at, caplog):
    run("t.py")
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("n.py",), "n.py: autocast(loss): nothing would run in bfloat16"),
        (("j.py", "--policy", "float32"), "float32 everywhere"),
        (("t.py", "--policy", "float32"), "puts nothing in 16 bits"),
        (("j.py", "--policy", "mixed_flaot16"), "Did you mean 'mixed_float16'"),
        (("j.py", "--policy", "float32,mixed_float16"), "one policy at a time"),
        (("nothing.py",), "neither a built-in recipe"),
        ((), "Missing argument 'RECIPE'"),
    ],
)
def test_what_cannot_be_explained_is_an_error_with_a_reason(at, arguments, said):
    pytest.importorskip("jax")
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
