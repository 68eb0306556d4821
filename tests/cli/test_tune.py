import json

import pytest
from click.testing import CliRunner

from halfstep.cli.group import halfstep
from halfstep.compare import parse_policies

RECIPE = """
import torch
from torch import nn
class Loud(nn.Module):
    def forward(self, x): return (x * 300) ** 2 / 9e4
def make_model(): return nn.Sequential(nn.Linear(4, 8), Loud(), nn.Linear(8, 1))
def make_optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.01)
def batches(epoch, seed):
    return torch.randn(6, 16, 4, generator=torch.Generator().manual_seed(10 * seed + epoch))
def loss(model, x): return (model(x) - x.sum(1, True)).square().mean()
def evaluate(model): return {"error": 1.0}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(RECIPE)
    return "r.py"


def run(*arguments):
    return CliRunner().invoke(
        halfstep, ["tune", "--device", "cpu", "--threads", "1", *arguments], prog_name="halfstep"
    )


def test_the_policy_is_written_and_every_run_is_told(recipe, tmp_path):
    result = run(recipe, "--steps", "8", "-o", "out/p.json", "--json", "out/all.json")
    assert result.exit_code == 0, result.output
    assert "1 of 4 layers must stay in float32:" in result.output
    assert "seed 1: kept '1': tracks" in result.output
    assert "halfstep compare r.py --policies float32,out/p.json" in result.output
    [policy] = parse_policies("out/p.json").values()
    assert {key: p.name for key, p in policy.overrides.items()} == {"1": "float32"}
    everything = json.loads((tmp_path / "out" / "all.json").read_text())
    assert everything["layers"][0]["path"] == "1"
    assert everything["trials"][0]["purpose"] == "baseline"


def test_a_range_problem_goes_away_in_bfloat16(recipe):
    result = run(recipe, "--steps", "8", "--target", "mixed_bfloat16", "--tolerance", "0.05")
    assert result.exit_code == 0, result.output
    assert "None needed" in result.output
    assert parse_policies("tuned.json")["tuned"].overrides == {}


def test_where_no_layer_helps_the_status_is_1_and_nothing_is_written(recipe, tmp_path):
    fault = """
class Unscalable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, gradient): return torch.where(gradient > 1, torch.inf, gradient)
plain = loss
def loss(model, x): return Unscalable.apply(plain(model, x) / 1e6)
def make_model(): return nn.Linear(4, 1)
def make_optimizer(model): return torch.optim.SGD(model.parameters(), lr=1e4)
"""
    (tmp_path / "r.py").write_text(RECIPE + fault)
    result = run(recipe, "--steps", "4")
    assert result.exit_code == 1, result.output
    assert "Nothing found" in result.output
    assert not (tmp_path / "tuned.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "RECIPE"),
        (["r.py", "--target", "float32"], "'float32' is not one of"),
        (["r.py", "--target", "mixed_bfloat16", "--keep", "mixed_bfloat16"], "kept from"),
        (["r.py", "--steps", "0"], "--steps"),
        (["digits-konv"], "Did you mean 'digits-conv'"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(recipe, arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_recipe_that_does_not_train_in_float32_is_status_2(recipe, tmp_path):
    (tmp_path / "r.py").write_text(RECIPE + "def loss(model, x): return model(x).log().mean()\n")
    result = run(recipe)
    assert result.exit_code == 2
    assert "in float32 the loss is not finite" in " ".join(result.output.split())
