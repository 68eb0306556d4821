import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep import RecordError
from halfstep.core.record import RecordWriter, dump_line, read_record

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def write(path, *events):
    with RecordWriter(path, "test", seed=1) as record:
        for event in events:
            record.write(event)


@given(values=st.dictionaries(st.text().filter(lambda key: key != "event"), plain))
def test_every_plain_value_comes_back_as_it_was(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("record") / "run.jsonl"
    write(path, {"event": "e", **values})
    assert read_record(path).events == [{"event": "e", **values}]


def test_floats_that_are_not_finite_come_back_and_the_lines_are_strict_json(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, {"event": "e", "values": [math.nan, math.inf, {"deep": -math.inf}]})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    nan, inf, deep = read_record(path).events[0]["values"]
    assert math.isnan(nan)
    assert inf == math.inf
    assert deep == {"deep": -math.inf}


def test_a_line_is_in_the_file_before_the_record_is_closed(tmp_path):
    path = tmp_path / "run.jsonl"
    record = RecordWriter(path, "test")
    record.write({"event": "e", "n": 1})
    assert read_record(path).events == [{"event": "e", "n": 1}]
    record.close()


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    path = tmp_path / "run.jsonl"
    write(path, {"event": "a"}, {"event": "b", "text": "ü"})
    whole = path.read_bytes()
    header_end = whole.index(b"\n") + 1
    for cut in range(header_end, len(whole)):
        path.write_bytes(whole[:cut])
        record = read_record(path)
        assert record.torn == (whole[cut - 1 : cut] != b"\n")
        assert [e["event"] for e in record.events] == ["a", "b"][: whole[header_end:cut].count(10)]


def test_the_header_says_format_version_and_kind(tmp_path):
    write(tmp_path / "run.jsonl")
    header = read_record(tmp_path / "run.jsonl").header
    assert header == {
        "event": "header", "format": "halfstep-record", "version": 1, "kind": "test", "seed": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["not json", ""], "line 1: not JSON"),
        (['{"event": "step"}', ""], "line 1: not the header"),
        (['{"event": "header", "format": "other", "version": 1}', ""], "line 1: not the header"),
        (["{header}", "[1, 2]", ""], "line 2: not an event"),
        (["{header}", '{"step": 1}', ""], "line 2: not an event"),
        (["{header}", '{"event": "a"}', "{{", '{"event": "b"}', ""], "line 3: not JSON"),
        (['{"event": "header", "format": "halfstep-record", "version": 2}', ""], "reads 1 to 1"),
        ([""], "line 1"),
    ],
)
def test_what_is_no_record_is_refused_with_file_and_line(tmp_path, lines, said):
    path = tmp_path / "bad.jsonl"
    header = '{"event": "header", "format": "halfstep-record", "version": 1}'
    path.write_text("\n".join(header if line == "{header}" else line for line in lines))
    with pytest.raises(RecordError, match=said) as error:
        read_record(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_place_that_cannot_be_written_are_said(tmp_path):
    with pytest.raises(RecordError, match=r"nothing\.jsonl"):
        read_record(tmp_path / "nothing.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot write"):
        RecordWriter(tmp_path / "file" / "run.jsonl", "test")


@pytest.mark.parametrize("event", [{"step": 1}, {"event": 3}, {"event": "e", "x": object()}])
def test_what_is_no_event_is_refused_when_written(event):
    with pytest.raises(RecordError):
        dump_line(event)
