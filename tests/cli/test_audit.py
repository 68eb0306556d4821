import json

import pytest
from click.testing import CliRunner

from halfstep.cli.group import halfstep

RECIPE = """
import torch
from torch import nn
class Norm(nn.Module):
    def forward(self, x): return x / (x.norm(dim=-1, keepdim=True) + 1e-9)
def make_model(): return nn.Sequential(nn.Linear(8, 16), Norm(), nn.Linear(16, 8))
def make_optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.1)
def batches(epoch, seed): return torch.ones(4, 2, 8)
def loss(model, batch): return model(batch).square().mean()
def evaluate(model): return {"error": 1.0}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(RECIPE)
    (tmp_path / "head.json").write_text(
        '{"default": {"name": "mixed_float16"}, "overrides": {"1": {"name": "float32"}}}'
    )
    return "r.py"


def run(*arguments):
    return CliRunner().invoke(halfstep, ["audit", *arguments], prog_name="halfstep")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 1),
        (["--fail-on", "error"], 1),
        (["--fail-on", "never"], 0),
        (["--silence", "epsilon"], 0),
        (["--silence", "epsilon", "--fail-on", "hint"], 1),  # the hardware
        (["--silence", "epsilon", "--silence", "hardware", "--fail-on", "hint"], 0),
        (["--policy", "mixed_bfloat16"], 0),
        (["--policy", "head.json"], 0),
        (["--policy", "float32", "--fail-on", "hint"], 0),
    ],
)
def test_the_exit_status_says_whether_there_was_a_finding_that_bad(recipe, options, code):
    result = run(recipe, "--device", "cpu", *options)
    assert result.exit_code == code, result.output


def test_findings_are_printed_and_written_as_json(recipe, tmp_path):
    result = run(recipe, "--device", "cpu", "--json", "out/found.json")
    assert result.output.startswith("Under mixed_float16: 1 error")
    assert "r.py:5, in forward" in result.output
    plain = json.loads((tmp_path / "out" / "found.json").read_text())
    assert (plain["recipe"], plain["policy"], plain["worst"]) == ("r.py", "mixed_float16", "error")
    assert plain["findings"][0]["rule"] == "epsilon"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["found.json"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "RECIPE"),
        (["digits-konv"], "Did you mean 'digits-conv'"),
        (["r.py", "--silence", "epsilonn"], "'epsilonn' is not one of"),
        (["r.py", "--policy", "float33"], "Did you mean 'float32'"),
        (["r.py", "--policy", "float32,bfloat16"], "names 2 policies"),
        (["r.py", "--policy", "mixed_flaot16"], "--policy: 'mixed_flaot16' is neither a policy"),
        (["r.py", "--device", "nonsense"], "--device nonsense"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(recipe, arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["audit", "tune"])
def test_a_recipe_of_another_framework_is_refused(command):
    result = CliRunner().invoke(halfstep, [command, "digits-jax"], prog_name="halfstep")
    assert result.exit_code == 2
    assert "torch only" in " ".join(result.output.split())
