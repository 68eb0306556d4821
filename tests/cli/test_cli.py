"""The group: help without imports, errors in one message, polite where parts are missing."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import halfstep
from halfstep.cli import group as module
from halfstep.cli.group import COMMANDS, Entry, load
from halfstep.cli.group import halfstep as group


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(group, list(arguments), prog_name="halfstep")

    return invoke


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture
def command(monkeypatch):
    """Put a module with one command into the table, under a name of its own."""

    def add(name, body):
        fake = type(sys)(f"made_up_{name}")
        fake.command = click.command(name)(body)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setitem(COMMANDS, name, Entry(f"{fake.__name__}:command", "Made up."))

    return add


def test_without_arguments_it_prints_help(run):
    bare, asked = run(), run("--help")
    assert bare.exit_code == asked.exit_code == 0
    assert bare.output.strip() == asked.output.strip()
    for name, entry in COMMANDS.items():
        assert name in bare.output
        assert entry.help in " ".join(bare.output.split())


def test_version(run):
    found = run("--version")
    assert found.exit_code == 0
    assert found.output.startswith(f"halfstep {halfstep.__version__} ")


def test_help_imports_no_command_and_no_framework():
    code = (
        "import sys, json\n"
        "from halfstep.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "print(json.dumps([code, sorted(sys.modules)]))"
    )
    exit_code, loaded = json.loads(python(code).stdout.splitlines()[-1])
    assert exit_code == 0
    assert not {"torch", "jax", "halfstep.cli.doctor", "halfstep.cli.compare"} & set(loaded)


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_it_says_what_to_install(missing):
    done = python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from halfstep.cli import main\nmain(['--help'])"
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'halfstep[cli]'" in done.stderr
    assert missing in done.stderr


def test_python_m_runs_it():
    done = subprocess.run(
        [sys.executable, "-m", "halfstep.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"halfstep {halfstep.__version__}")


def test_an_unknown_command_names_the_nearest(run):
    found = run("docter")
    assert found.exit_code == 2
    assert "No such command 'docter'. Did you mean 'doctor'?" in found.output


def test_every_error_of_ours_is_one_message_and_exit_code_2(run, command):
    def body():
        raise halfstep.PolicyError("Policy('x'): unknown policy.")

    command("raises", body)
    found = run("raises")
    assert found.exit_code == 2
    assert found.output == "Error: Policy('x'): unknown policy.\n"
    assert isinstance(found.exception, SystemExit)


def test_other_errors_keep_their_traceback(run, command):
    def body():
        raise ZeroDivisionError("a bug")

    command("breaks", body)
    assert isinstance(run("breaks").exception, ZeroDivisionError)


def test_a_command_that_needs_more_names_the_extra_and_help_still_works(run, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch.nn")

    monkeypatch.setattr(module, "load", missing)
    found = run("compare")
    assert found.exit_code == 2
    assert "`halfstep compare` needs torch" in found.output
    assert "pip install 'halfstep[torch]'" in found.output
    assert "doctor" in run("--help").output


def test_a_part_that_is_missed_while_running_names_the_extra(run, command):
    def body():
        raise ModuleNotFoundError("No module named 'plotly'", name="plotly")

    command("page", body)
    found = run("page")
    assert found.exit_code == 2
    assert "pip install 'halfstep[report]'" in found.output


def test_a_module_of_ours_that_is_missing_is_a_bug_and_not_hidden(run, monkeypatch):
    monkeypatch.setitem(COMMANDS, "lost", Entry("halfstep.no_such_module:command", "Lost."))
    assert isinstance(run("lost").exception, ModuleNotFoundError)


def test_the_table_names_real_commands():
    assert isinstance(load("doctor"), click.Command)
    assert load("doctor").name == "doctor"
