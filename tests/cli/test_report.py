"""``halfstep report``."""

import pytest
from click.testing import CliRunner

from halfstep.cli.group import halfstep
from halfstep.core.record import RecordWriter

HEADER = {
    "numerics": 1, "library": "torch", "halfstep": "0.1.0", "device": "cpu", "model": "Net",
    "every": 1, "policy": None, "loss_scale": None, "formats": ["float16"], "layers": [],
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(halfstep, ["report", *map(str, arguments)])


@pytest.fixture
def record(tmp_path):
    with RecordWriter(tmp_path / "run.jsonl", "numerics", **HEADER):
        pass
    return tmp_path / "run.jsonl"


def test_the_page_lies_beside_the_record_unless_told(record, tmp_path):
    result = run(record)
    assert result.exit_code == 0, result.output
    assert f"page: {tmp_path / 'run.html'}" in result.output
    assert "Net" in (tmp_path / "run.html").read_text()
    assert run(record, "-o", tmp_path / "a" / "b.html").exit_code == 0
    assert (tmp_path / "a" / "b.html").exists()


def test_what_is_no_record_is_told_in_one_message(tmp_path):
    missing = run(tmp_path / "none.jsonl")
    assert missing.exit_code == 2
    assert "cannot read this record" in missing.output
    (tmp_path / "text.jsonl").write_text("hello\n")
    wrong = run(tmp_path / "text.jsonl")
    assert wrong.exit_code == 2
    assert "line 1: not JSON" in wrong.output
    assert not (tmp_path / "text.html").exists()
