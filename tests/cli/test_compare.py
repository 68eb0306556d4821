import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from halfstep import RecordError, report
from halfstep.cli.group import halfstep
from halfstep.compare import Settings, compare
from halfstep.core.record import read_record

TINY = """
import torch
from torch import nn
STEPS = 3
def make_model(): return nn.Linear(3, 1)
def make_optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.1)
def batches(epoch, seed):
    yield from torch.ones(100000, 2, 3)
def loss(model, batch): return model(batch).square().mean()
def evaluate(model): return {"error": model(torch.ones(1, 3)).abs().item()}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(TINY)
    return "tiny.py"


def run(*arguments):
    return CliRunner().invoke(halfstep, ["compare", *arguments], prog_name="halfstep")


def test_a_run_writes_record_summary_and_page_and_says_where(tiny, tmp_path):
    result = run(
        tiny, "--no-memory", "--policies", "float32,mixed_bfloat16", "--json", "out/r.json",
        "--html", "out/r.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mixed_bfloat16" in result.output
    for name in ("r.json", "r.html", "r.jsonl"):
        assert str(tmp_path / "out" / name) in result.output
    summary = report.load("out/r.json")
    assert summary["recipes"][0]["verdict"] in " ".join(result.output.split())
    assert summary["recipes"][0]["verdict"] in (tmp_path / "out" / "r.html").read_text()
    assert read_record("out/r.jsonl").events[-1]["status"] == "finished"
    assert sorted(os.listdir("out")) == ["r.html", "r.json", "r.jsonl"]


def test_the_numbers_of_each_run_are_recorded_and_linked(tiny, tmp_path):
    result = run(
        tiny, "--no-memory", "--policies", "float32,mixed_float16", "--steps", "5",
        "--numerics", "2", "--html", "out/r.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "r.html").read_text()
    links = re.findall(r'<a href="([^"]+)">(\w+)</a>', page)
    assert [label for _, label in links] == ["float32", "mixed_float16"]
    for link, label in links:
        assert "Exponents over time" in (tmp_path / "out" / link).read_text()
        record = read_record((tmp_path / "out" / link).with_suffix(".jsonl"))
        steps = [event["step"] for event in record.events if event["event"] == "numerics"]
        assert (record.header["kind"], steps) == ("numerics", [1, 3, 5])
        assert (record.header["policy"] == label) == (label != "float32")
    assert len(links) == 2


def test_numbers_need_a_record_to_lie_beside():
    with pytest.raises(RecordError, match="give record="):
        compare("digits-mlp", "float32", Settings(steps=1, numerics=1))


def test_without_a_place_only_the_record_is_left(tiny, tmp_path):
    assert run(tiny, "--no-memory", "--policies", "float32", "--steps", "1").exit_code == 0
    [record] = (tmp_path / "runs").iterdir()
    assert record.name.startswith("compare-")
    assert len([e for e in read_record(record).events if e["event"] == "step"]) == 1


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (["--record", "a/b.jsonl"], "a/b.jsonl"),
        (["--html", "h.html"], "h.jsonl"),
        (["--json", "j.jsonl"], "j.record.jsonl"),
    ],
)
def test_the_record_goes_where_it_is_told_or_beside_the_rest(tiny, options, place):
    assert run(tiny, "--no-memory", "--policies", "float32", *options).exit_code == 0
    assert read_record(place).header["kind"] == "compare"


def test_the_options_reach_the_run(tiny):
    arguments = ("--no-memory", "--policies", "float32", "--json", "r.json")
    run(tiny, *arguments, "--steps", "7", "--seed", "5", "--device", "cpu", "--threads", "1")
    summary = report.load("r.json")
    assert summary["seed"] == 5
    assert summary["machine"]["threads"] == 1
    assert summary["recipes"][0]["device"] == "cpu"
    assert summary["recipes"][0]["policies"]["float32"]["steps"] == 7


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "digits-conv"),
        (["tiny.py", "--new", "x.py"], 2, "--new FILE"),
        (["tiny.py", "--framework", "jax"], 2, "--framework is for --new"),
        (["--new", "x.py", "--framework", "jaxx"], 2, "'jaxx' is not one of"),
        (["tiny.py", "--steps", "3", "--epochs", "3"], 2, "one of them"),
        (["tiny.py", "--steps", "0"], 2, "--steps"),
        (["digits-konv"], 2, "Did you mean 'digits-conv'"),
        (["tiny.py", "--policies", "float33"], 2, "Did you mean 'float32'"),
        (["tiny.py", "--device", "nonsense"], 2, "--device nonsense"),
        (["tiny.py", "--record", "tiny.py/x.jsonl"], 2, "cannot write"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(tiny, arguments, code, said):
    result = run(*arguments)
    assert result.exit_code == code
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_recipe_that_fails_ends_with_1_and_its_message(tiny, tmp_path):
    (tmp_path / "tiny.py").write_text(TINY + "def loss(model, batch): return None\n")
    result = run(tiny, "--no-memory", "--policies", "float32", "--html", "r.html")
    assert result.exit_code == 1
    assert "must return a scalar tensor" in " ".join(result.output.split())
    assert "must return a scalar tensor" in (tmp_path / "r.html").read_text()


def test_new_writes_a_recipe_once(tiny, tmp_path):
    result = run("--new", "mine.py")
    assert result.exit_code == 0
    assert "halfstep compare mine.py" in result.output
    (tmp_path / "mine.py").write_text("mine")
    result = run("--new", "mine.py")
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert (tmp_path / "mine.py").read_text() == "mine"


def test_a_new_recipe_may_be_of_another_framework(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--new", "mine.py", "--framework", "jax").exit_code == 0
    assert 'FRAMEWORK = "jax"' in (tmp_path / "mine.py").read_text()


def test_a_page_that_cannot_be_made_is_said_before_the_training(tiny, monkeypatch, tmp_path):
    for name in list(sys.modules):
        if name.startswith("halfstep.report"):
            monkeypatch.delitem(sys.modules, name)
    import halfstep as package

    monkeypatch.delattr(package, "report", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run(tiny, "--policies", "float32", "--html", "r.html")
    assert result.exit_code == 2
    assert "halfstep[report]" in result.output
    assert not (tmp_path / "r.jsonl").exists()


def wait_for_steps(path, process):
    for _ in range(600):
        if path.exists() and path.read_text().count('"event": "step"') > 20:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no step in a minute")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_what_there_was(tiny, tmp_path, sent):
    command = [sys.executable, "-m", "halfstep.cli", "compare", tiny, "--no-memory", "--steps"]
    command += ["1000000", "--policies", "float32", "--json", "r.json", "--html", "r.html"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "r.jsonl", process)
    process.send_signal(sent)
    out, complaint = process.communicate(timeout=60)
    summary = report.load("r.jsonl")
    assert summary["recipes"][0]["policies"]["float32"]["steps"] > 20
    if sent == signal.SIGKILL:
        assert summary["status"] == "unfinished"
        return
    assert process.returncode == 130
    assert "Traceback" not in complaint
    assert "Interrupted" in out
    assert summary["status"] == "interrupted"
    assert json.loads((tmp_path / "r.json").read_text())["status"] == "interrupted"
    assert "This run is interrupted" in (tmp_path / "r.html").read_text()
