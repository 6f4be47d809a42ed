"""The page: everything escaped, nothing loaded from outside, and it can be told when that is not so."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from gradent.errors import InputError
from gradent.figures.charts import Chart, HeatMap, Line
from gradent.report.page.html import Page, Section, render_page, write_page
from gradent.report.page.parts import Cell, Quote, Table, Word, Words

EVIL = "<script>alert(1)</script>&\"'</td>{{ 7*7 }}"


class Reader(HTMLParser):
    """Collects what a browser would load, every element, and the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.policy = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        named = [values.get(name) or "" for name in ("src", "href", "data", "action", "poster", "srcset")]
        self.loads += [each for each in named if each and not (tag == "a" and each.startswith("#"))]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]

    def handle_data(self, data):
        if self.tags[-1:] not in (["script"], ["style"]):
            self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def figures(html: str) -> list[dict]:
    found = re.findall(r'<script type="application/json" class="figure">(.*?)</script>', html, flags=re.DOTALL)
    return [json.loads(each) for each in found]


@pytest.fixture(scope="module")
def evil_page():
    chart = Chart(EVIL, EVIL, [Line(EVIL, [0, 1, 2], [1.0, float("nan"), 3.0], [0.1, float("nan"), 0.1])])
    table = Table((EVIL,), [[Cell((EVIL, EVIL), "bad")], [EVIL]])
    return render_page(Page(EVIL, EVIL, [(EVIL, EVIL)], [Section(EVIL, EVIL, [table, chart])], EVIL))


def test_text_is_escaped(evil_page):
    shown = read(evil_page)
    assert shown.tags.count("script") == 3  # the figure, plotly.js, the page's own
    assert shown.text.count(EVIL) >= 9
    assert "<script>alert" not in evil_page


def test_control_characters_are_written_out():
    hidden = "a\u202eb\x00c\x1b[2J\u2066d\n e"
    table = Table((hidden,), [[hidden]])
    chart = Chart(hidden, hidden, [Line(hidden, [0], [1.0])])
    words = Words([(hidden, [Word(hidden, 1.0, hidden)])], hidden, hidden)
    parts = [table, chart, words, Quote(hidden, hidden), HeatMap(hidden, hidden, [hidden], [hidden], [[0.0]], hidden)]
    html = render_page(Page(hidden, hidden, [(hidden, hidden)], [Section(hidden, hidden, parts)], hidden))
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not set("\u202e\x00\x1b\u2066") & set(own)
    assert read(html).text.count("a\\u202eb\\x00c\\x1b[2J\\u2066d\n e") >= 12
    assert not any(set("\u202e\x00") & set(json.dumps(figure, ensure_ascii=False)) for figure in figures(html))


def test_labels_of_charts_hold_no_markup(evil_page):
    (figure,) = figures(evil_page)
    names = [trace.get("name", "") for trace in figure["data"]]
    names += [figure["layout"]["xaxis"]["title"]["text"], figure["layout"]["yaxis"]["title"]["text"]]
    assert any("&lt;script&gt;" in name for name in names)
    assert not any("<" in name for name in names)


def test_a_nan_is_a_gap(evil_page):
    (figure,) = figures(evil_page)
    line = next(trace for trace in figure["data"] if trace["mode"] == "lines+markers")
    assert line["y"] == [1.0, None, 3.0]
    band = next(trace for trace in figure["data"] if trace.get("fill"))
    assert None in band["y"]


def test_nothing_is_loaded_from_outside(evil_page):
    shown = read(evil_page)
    assert shown.loads == []
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & set(shown.tags)
    assert shown.policy.startswith("default-src 'none'")
    assert "http" not in shown.policy
    styles = re.findall(r"<style>(.*?)</style>", evil_page, flags=re.DOTALL)
    assert styles
    assert not any("url(" in style or "@import" in style for style in styles)


def test_the_check_of_loads_can_fail():
    assert read('<script src="https://example.org/x.js"></script>').loads == ["https://example.org/x.js"]
    assert read('<link rel="stylesheet" href="x.css">').loads == ["x.css"]
    assert read('<a href="#main"></a><a href="x#main"></a><img src="#y">').loads == ["x#main", "#y"]


def test_a_page_without_charts_carries_no_plotly():
    html = render_page(Page("Title", "Lead", (), [Section("S", "", [Table(("a",), [["b"]])])]))
    assert len(html) < 20_000
    assert "script" not in read(html).tags


def test_light_and_dark():
    assert "prefers-color-scheme: dark" in render_page(Page("Title", "Lead"))


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="--out"):
        write_page(tmp_path / "missing" / "report.html", Page("Title", "Lead"))
