"""Every block of Python in the README and in the docs is run, page by page, as a reader would.

Blocks of a page share one namespace. A block ``output`` after a block ``python`` is what that
one printed; a block ``pycon`` is a session with its output. A block that cannot run here stands
below a comment with the reason: ``<!-- not run: it needs a GPU -->``.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import halfstep

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*\w[^\n]*) -->\n+)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        yield Block(found["language"], found["code"], line, found["reason"])


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> str:
    # empty lines in front, so that a traceback names the page's own line
    code = compile("\n" * block.line + block.code, str(page), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def run_session(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    session = doctest.DocTestParser().get_doctest(
        block.code, namespace, page.name, str(page), block.line
    )
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(session, out=report.write, clear_globs=False)
    assert not runner.failures, report.getvalue()
    namespace.update(session.globs)


@pytest.fixture
def as_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    halfstep.set_global_policy("float32")
    if "torch._dynamo" in sys.modules:  # a page tells how to turn this on
        torch._dynamo.config.trace_autograd_ops = False


@pytest.mark.usefixtures("as_a_reader")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what looks a function's module up by its name (Dynamo, pickle) finds the page
    script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    namespace = script.__dict__
    printed = ""
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            printed = run_python(block, page, namespace)
        elif block.language == "pycon":
            run_session(block, page, namespace)
        elif block.language == "output":
            same = doctest.OutputChecker().check_output(block.code, printed, FLAGS)
            assert same, f"{page.name}:{block.line} says\n{block.code}\nprinted was\n{printed}"


def commands() -> Iterator[Any]:
    for page in PAGES:
        for block in blocks(page):
            if block.language != "console" or block.reason is not None:
                continue
            for line in block.code.splitlines():
                if line.startswith("$ halfstep "):
                    yield pytest.param(line[2:], id=f"{page.stem}: {line[2:]}")


@pytest.mark.parametrize("command", list(commands()))
def test_a_command_in_the_docs_has_options_that_exist(command: str) -> None:
    from halfstep.cli.group import halfstep as group

    _, name, *arguments = shlex.split(command)
    context = group.make_context("halfstep", [name, *arguments])
    _, found, rest = group.resolve_command(context, [name, *arguments])
    assert found is not None
    found.make_context(name, rest)  # raises UsageError for an option that is none


_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES[1:]], ids=lambda page: page.stem)
def test_a_link_to_a_file_leads_to_one(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    missing = [to for to in _LINK.findall(text) if not (page.parent / to).exists()]
    assert not missing


def test_a_block_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\nprint(x)\n```\n\n```pycon\n>>> x + 1\n3\n```\n")
    first, second = blocks(page)
    namespace: dict[str, Any] = {}
    assert run_python(first, page, namespace) == "1\n"
    with pytest.raises(AssertionError, match="Got"):
        run_session(second, page, namespace)


def test_a_block_is_left_out_only_with_a_reason(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: it needs a GPU -->\n```python\na\n```\n"
        "<!-- not run: -->\n```python\nb\n```\n"
    )
    assert [(block.code, block.reason) for block in blocks(page)] == [
        ("a\n", "it needs a GPU"),
        ("b\n", None),
    ]
