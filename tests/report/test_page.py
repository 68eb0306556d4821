import json
import re
from html.parser import HTMLParser

import pytest

from halfstep import RecordError, report
from halfstep.core.record import RecordWriter


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text outside of scripts."""

    def __init__(self, page):
        super().__init__()
        self.found, self.words, self._open = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_says_everything(summary):
    text = Elements(report.render(summary())).text
    for said in (
        "Title of first", "Title of second", "took 2.0× the time", "Scaled down.",
        "binomial standard error", "AMX-BF16", "16.00 GiB", "halfstep compare", "torch 2.13.0",
        "may run slowly", "noted", "20.0", "skipped steps", "seed 0",
    ):  # fmt: skip
        assert said in text, said


def test_the_verdict_stands_before_the_table(summary):
    page = report.render(summary())
    assert page.index('class="verdict"') < page.index("<table") < page.index('class="plot"')


def test_nothing_is_loaded_from_anywhere(summary):
    elements = Elements(report.render(summary())).found
    for tag, attributes in elements:
        assert tag not in ("link", "iframe", "img", "object", "embed"), tag
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), (tag, attributes)
    policy = next(a["content"] for _, a in elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_there_once(summary):
    page = report.render(summary())
    assert len(re.findall(r"plotly\.js v\d", page[:6_000_000])) == 1
    assert len(re.findall("<script", page)) == 2


@pytest.mark.parametrize("evil", ["</script><script>alert(1)</script>", "<img src=x>", "\"'&<!--"])
def test_words_of_a_recipe_cannot_become_markup(summary, evil):
    tame = [tag for tag, _ in Elements(report.render(summary())).found]
    elements = Elements(report.render(summary(evil)))
    assert [tag for tag, _ in elements.found] == tame
    assert " ".join(evil.split()) in elements.text


def test_plots_reach_the_script_as_json(summary):
    page = report.render(summary())
    [found] = re.findall(r"const plots = (\[.*?\]);\n", page)
    ids = [plot["id"] for plot in json.loads(found)]
    assert len(ids) == 12 == len(set(ids))
    assert all(f'id="{each}"' in page for each in ids)


def test_a_stopped_run_says_so(record):
    from halfstep.compare.summary import summarise

    cut = record()
    del cut.events[150:]
    text = Elements(report.render(summarise(cut))).text
    assert "This run is unfinished" in text


def test_a_policy_that_was_lost_says_why_in_the_table(summary):
    given = summary()
    lost = given["recipes"][0]["policies"]["mixed_float16"]
    lost.update(status="diverged", reason="the loss was not finite", stopped_at=7)
    assert "diverged at step 7: the loss was not finite" in Elements(report.render(given)).text


def test_the_page_can_be_made_from_the_json_and_from_the_record(summary, record, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(summary()))
    given = record()
    header = {k: v for k, v in given.header.items() if k not in ("event", "kind")}
    with RecordWriter(tmp_path / "run.jsonl", "compare", **header) as writer:
        for event in given.events:
            writer.write(event)
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"event": "torn')
    pages = [report.render(report.load(tmp_path / name)) for name in ("run.json", "run.jsonl")]
    assert pages[0] == pages[1] == report.render(summary())


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "other"}', '{"format": "halfstep-compare", "version": 9}']
)
def test_what_is_no_summary_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(RecordError, match=r"bad\.json"):
        report.load(tmp_path / "bad.json")
    with pytest.raises(RecordError, match=r"none\.json"):
        report.load(tmp_path / "none.json")


def test_what_is_no_summary_is_not_rendered():
    with pytest.raises(RecordError, match="not a halfstep-compare summary"):
        report.render({"recipes": []})
