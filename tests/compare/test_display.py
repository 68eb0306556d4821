import io

import pytest
from rich.console import Console

from halfstep.compare.display import Progress, print_summary
from halfstep.compare.summary import summarise


def console(terminal=False, width=100):
    return Console(
        file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, no_color=True,
        legacy_windows=False,
    )  # fmt: skip


def play(record, out, tick=11.0):
    """Show a record as if it happened now, each event `tick` seconds after the one before."""
    now = [0.0]
    with Progress(out, clock=lambda: now[0]) as progress:
        for event in [record.header, *record.events]:
            now[0] += tick
            progress(event)
    return out.file.getvalue()


@pytest.fixture
def record(made_up):
    lost = {"stopped": ("diverged", 12, "the loss [/] was not finite"), "memory": [2**20]}
    return made_up(
        {"float32": {"metric": 0.98, "memory": [2**21]}, "mixed_float16": {"seconds": 0.02},
         "mixed_bfloat16": lost},
    )  # fmt: skip


def test_without_a_terminal_there_are_plain_lines_now_and_then(record):
    said = play(record, console())
    assert "\x1b" not in said
    assert "r: R, 40 steps" in said
    assert "mixed_bfloat16 diverged at step 12: the loss [/] was not finite" in said
    assert "measuring memory" in said
    quiet = play(record, console(), tick=0.01)
    assert len(quiet.splitlines()) < len(said.splitlines()) / 3


def test_on_a_terminal_the_table_is_alive_and_gone_at_the_end(record):
    said = play(record, console(terminal=True))
    assert "40/40" in said
    assert "Ctrl-C stops" in said
    assert said.rstrip().endswith("\x1b[2K\x1b[?25h") or "\x1b[?25h" in said


def test_the_ratio_so_far_does_not_depend_on_who_goes_first(made_up):
    record = made_up({"a": {"seconds": 0.01}, "b": {"seconds": 0.03}}, steps=6)
    steps = [e for e in record.events if e["event"] == "step"]
    by_step = sorted(
        steps, key=lambda e: (e["step"], e["policy"] == ("a" if e["step"] % 2 else "b"))
    )
    record.events[:] = [record.events[0], *by_step]
    said = play(record, console())
    assert said.rstrip().splitlines()[-1].endswith("3.00×")


def test_the_table_has_every_figure(made_up):
    half = {"seconds": 0.025, "metric": 0.91, "memory": [5 * 2**20], "skipped_at": [3, 4]}
    record = made_up({"float32": {"metric": 0.98, "memory": [10 * 2**20]}, "mixed_float16": half})
    out = console()
    print_summary(summarise(record), out)
    said = out.file.getvalue()
    row = next(line for line in said.splitlines() if line.split()[:1] == ["mixed_float16"])
    for figure in ("25.0", "2.50 (2.50–2.50)", "5.0 MiB", "0.50", "0.9100", " 2 ", "worse"):
        assert figure in row
    assert "mixed_float16 took 2.5× the time" in said


def test_it_fits_a_narrow_terminal(made_up):
    record = made_up({"float32": {"metric": 0.9}, "mixed_bfloat16": {"metric": 0.9}})
    out = console(width=80)
    print_summary(summarise(record), out)
    assert max(map(len, out.file.getvalue().splitlines())) <= 80


def test_an_error_and_a_note_are_shown(made_up):
    record = made_up({"float32": {}}, status="failed", error="loss [bold] returned None")
    record.events[0]["note"] = "Scaled down [sic]."
    out = console()
    print_summary(summarise(record), out)
    assert "loss [bold] returned None" in out.file.getvalue()
    assert "Scaled down [sic]." in out.file.getvalue()
