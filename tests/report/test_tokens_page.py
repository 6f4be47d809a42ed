"""The page of a pair's tokens, from its record alone: every number where it belongs, every token as text."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradent.errors import DataFileError
from gradent.record import read_token_record, write_token_record
from gradent.record.token_rows import list_tokens, rank_ends
from gradent.report import write_token_report
from gradent.report.page.numbers import signed_number
from tests.report.test_page import figures, read
from tests.report.token_records import HOSTILE, token_record

CHOSEN, REJECTED = ["The", " film", " was", " good", "."], ["The", " film", " felt", " long", ".", " Really"]


class Spans(HTMLParser):
    """Classes, titles and texts of the coloured tokens, block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[list[dict[str, str]]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "div" and values.get("class") == "words":
            self.blocks.append([])
            self._inside = True
        elif tag == "span" and self._inside:
            self.blocks[-1].append({**values, "text": ""})

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "div"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.blocks[-1][-1]["text"] += data


def page(place: Path, record: dict[str, Any]) -> str:
    write_token_record(place / "tokens.json", record)
    return write_token_report(place).read_text("utf-8")


def blocks(html: str) -> list[list[dict[str, str]]]:
    """Tokens of chosen and rejected by effect, then by entanglement."""
    reader = Spans()
    reader.feed(html)
    return reader.blocks


def test_rows_hold_what_the_record_says() -> None:
    record = token_record(CHOSEN, REJECTED)
    inner = np.array(record["inner"])
    rows = list_tokens(record)
    assert [(row.side, row.position, row.text) for row in rows] == [
        *(("chosen", place, text) for place, text in enumerate(CHOSEN)),
        *(("rejected", place, text) for place, text in enumerate(REJECTED)),
    ]
    assert [row.entanglement for row in rows] == pytest.approx([*inner.sum(1), *inner.sum(0)])
    assert [row.effect for row in rows] == [*record["chosen"]["effects"], *record["rejected"]["effects"]]
    assert [row.norm**2 for row in rows] == pytest.approx(
        [*record["chosen"]["squares"], *record["rejected"]["squares"]]
    )
    assert [row.text for row in rows if row.kind == "identical"] == 2 * ["The", " film", "."]
    assert sum(row.share for row in rows if row.side == "rejected") == pytest.approx(1.0)


def test_both_ends_are_ranked() -> None:
    rows = list_tokens(token_record(CHOSEN, REJECTED))
    entangling, disentangling = rank_ends(rows, attrgetter("entanglement"), 3)
    assert entangling[0].entanglement == max(row.entanglement for row in rows)
    assert [row.entanglement for row in entangling] == sorted((row.entanglement for row in entangling), reverse=True)
    assert all(row.entanglement < 0 for row in disentangling) and len(disentangling) <= 3
    assert rank_ends([], attrgetter("entanglement"), 3) == ([], [])


@pytest.mark.parametrize(
    ("value", "text"),
    [(2230.4, "+2,230"), (-0.0415, "-0.0415"), (12.345, "+12.3"), (0.0, "+0"), (1.2e-7, "+1.2e-07"), (-3e9, "-3e+09")],
)
def test_signed_numbers(value, text) -> None:
    assert signed_number(value) == text


def test_tokens_are_coloured_by_sign_and_size(tmp_path) -> None:
    record = token_record(CHOSEN, REJECTED)
    found = blocks(page(tmp_path, record))
    rows = list_tokens(record)
    values = {"effect": [row.effect for row in rows], "entanglement": [row.entanglement for row in rows]}
    for (name, bad_above), pieces in zip(
        (("effect", False), ("entanglement", True)), (found[:2], found[2:]), strict=True
    ):
        spans, largest = [*pieces[0], *pieces[1]], max(map(abs, values[name]))
        for span, value, row in zip(spans, values[name], rows, strict=True):
            classes = span["class"].split()
            assert ("above" in classes) == (value > 0)
            assert ("red" in classes) == ((value > 0) == bad_above)
            assert ("strong" in classes) == (not row.identical)
            assert span["style"] == f"--depth:{math.sqrt(abs(value) / largest):.2f}"
            assert signed_number(value) in span["title"] and row.kind in span["title"]
            assert span["text"] == row.text
    assert {span["style"] for block in found[:2] for span in block} >= {"--depth:1.00"}


def test_a_checker_of_colours_can_fail(tmp_path) -> None:
    record = token_record(CHOSEN, REJECTED)
    flipped = {**record["chosen"], "effects": [-value for value in record["chosen"]["effects"]]}
    moods = [
        [span["class"] for span in blocks(page(tmp_path, each))[0]] for each in (record, {**record, "chosen": flipped})
    ]
    assert all(one != other for one, other in zip(*moods, strict=True))


def test_facts_of_the_pair(tmp_path) -> None:
    record = token_record(CHOSEN, REJECTED)
    shown = " ".join(read(page(tmp_path, record)).text.split())
    inner = float(np.sum(record["inner"]))
    cosine = inner / math.sqrt(record["chosen"]["sq"] * record["rejected"]["sq"])
    assert "row 7, counted from 0, of 9 (pairs.jsonl:8)" in shown
    assert "5 chosen and 6 rejected tokens, 3 of them the same ones" in shown
    assert f"{cosine:+.4f}" in shown
    split = record["split"]
    assert f"identical tokens {signed_number(split['identical'])} ({split['identical'] / inner:.0%})" in shown
    sums = [sum(record[side]["effects"]) for side in ("chosen", "rejected")]
    assert signed_number(sums[0]) in shown and signed_number(sums[1]) in shown


def test_the_heat_map(tmp_path) -> None:
    record = token_record(CHOSEN, REJECTED)
    (figure,) = figures(page(tmp_path, record))
    (trace,) = figure["data"]
    norms = [np.sqrt(record[side]["squares"]) for side in ("chosen", "rejected")]
    np.testing.assert_allclose(trace["z"], np.array(record["inner"]) / norms[0][:, None] / norms[1][None], atol=1e-4)
    assert (trace["zmin"], trace["zmax"]) == (-1, 1)
    assert trace["y"] == ["0 · The", "1 · ␣film", "2 · ␣was", "3 · ␣good", "4 · ."]
    assert len(set(trace["x"])) == len(REJECTED)
    outlined = [(shape["y0"] + 0.5, shape["x0"] + 0.5) for shape in figure["layout"]["shapes"]]
    assert outlined == [(0, 0), (1, 1), (4, 4)]


def test_modules_by_their_parts(tmp_path) -> None:
    modules = {"<b>small": [1.0, 1.0, 0.1], "large": [3.0, 1.0, -0.7], "none": [0.0, 0.0, 0.0]}
    html = page(tmp_path, token_record(CHOSEN, REJECTED, modules=modules))
    body = html[html.index("Where it comes from") :]
    assert body.index("large") < body.index("&lt;b&gt;small") < body.index("none")
    assert "+116.7%" in body and "+75.0%" in body
    assert "Where it comes from" not in page(tmp_path, token_record(CHOSEN, REJECTED))


def test_hostile_tokens_are_text(tmp_path) -> None:
    data = {**token_record(["a"], ["b"])["data"], "source": HOSTILE[0], "where": HOSTILE[0]}
    evil = "".join(HOSTILE)
    html = page(
        tmp_path,
        token_record(
            [*HOSTILE, " one"], [" zero", *HOSTILE], prompt={"ids": [1], "text": evil}, data=data, notes=[evil],
            modules={evil: [1.0, 1.0, 1.0]},
        ),
    )  # fmt: skip
    shown = read(html)
    assert shown.tags.count("script") == 3  # the figure, plotly.js, the page's own
    assert not {"img", "b", "br", "link", "iframe"} & set(shown.tags)
    assert shown.loads == [] and shown.policy.startswith("default-src 'none'")
    assert "{{7*7}}" in shown.text and "$x$" in shown.text
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)  # plotly.js has such characters in its source
    assert not set("\u202e\x00\x1b") & set(own)
    texts = [span["text"] for span in blocks(html)[0]]
    assert texts[:5] == ["</script><img src=x onerror=alert(1)>", "<b>", "{{7*7}}", "$x$", "\\u202eabc"]
    assert texts[5:10] == ["\\x00", "⏎\n", "\t", " ", "(empty)"]
    assert "' onmouseover='alert(1)" in texts
    spans = [span for block in blocks(html) for span in block]
    assert {name for span in spans for name in span} == {"class", "style", "title", "text"}


def test_labels_of_hostile_tokens_hold_no_markup_and_no_two_are_alike(tmp_path) -> None:
    (figure,) = figures(page(tmp_path, token_record(3 * HOSTILE, [*HOSTILE, "x"])))
    (trace,) = figure["data"]
    assert len(set(trace["y"])) == 3 * len(HOSTILE)
    assert not any(set("<>\u202e\x00\n") & set(name) for name in [*trace["x"], *trace["y"]])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 40), (200, 200)])
def test_every_size(rows, columns, tmp_path) -> None:
    chosen, rejected = [f" c{number}" for number in range(rows)], [f" r{number}" for number in range(columns)]
    html = page(tmp_path, token_record(chosen, rejected))
    assert [len(block) for block in blocks(html)] == [rows, columns, rows, columns]
    assert len(html) < 8_000_000


def test_a_token_without_gradient_is_a_gap(tmp_path) -> None:
    record = token_record(CHOSEN, REJECTED)
    record["inner"][1] = [0.0] * len(REJECTED)
    for name in ("squares", "effects"):
        record["chosen"][name][1] = 0.0
    html = page(tmp_path, record)
    (figure,) = figures(html)
    assert figure["data"][0]["z"][1] == [None] * len(REJECTED)
    assert "neither (+0)" in blocks(html)[0][1]["title"] and "red" not in blocks(html)[0][1]["class"]


def test_a_pair_without_any_gradient(tmp_path) -> None:
    record = token_record(["a"], ["b"])
    nothing = {"squares": [0.0], "effects": [0.0], "sq": 0.0}
    split = dict.fromkeys(record["split"], 0.0)
    html = page(
        tmp_path,
        {**record, **{side: {**record[side], **nothing} for side in ("chosen", "rejected")}, "inner": [[0.0]],
         "split": split},
    )  # fmt: skip
    shown = read(html).text
    assert "none: a gradient is zero" in shown
    assert "No token is entangling" in shown and "No token is disentangling" in shown


def test_the_page_needs_no_torch(tmp_path) -> None:
    write_token_record(tmp_path / "tokens.json", token_record(CHOSEN, REJECTED))
    source = (
        "import sys\nfrom gradent.report import write_token_report\n"
        f"write_token_report({str(tmp_path)!r})\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_record_comes_back(tmp_path) -> None:
    record = token_record(CHOSEN, REJECTED)
    written = write_token_record(tmp_path / "tokens.json", record)
    found = read_token_record(tmp_path / "tokens.json")
    assert found == written and {name: found[name] for name in record} == record


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: record["chosen"]["tokens"].pop(), "chosen holds .*'tokens': 4.*one of each a token"),
        (lambda record: record["rejected"]["effects"].append(0.0), "rejected holds .*'effects': 7"),
        (lambda record: record["inner"].pop(), "inner is not a matrix of 5 rows of 6 numbers"),
        (lambda record: record["inner"][2].pop(), "inner is not a matrix"),
    ],
)
def test_a_record_that_does_not_fit_together(spoil, message, tmp_path) -> None:
    record = token_record(CHOSEN, REJECTED)
    spoil(record)
    write_token_record(tmp_path / "tokens.json", record)
    with pytest.raises(DataFileError, match=message):
        write_token_report(tmp_path)


def test_a_missing_record_is_named(tmp_path) -> None:
    with pytest.raises(DataFileError, match=r"tokens\.json: there is no such file. `gradent tokens"):
        write_token_report(tmp_path)


def with_masks(**changes: Any) -> dict[str, Any]:
    def side(values: list[float]) -> dict[str, Any]:
        return {"mask": values, "kept": [value >= 0.5 for value in values]}

    masks = {
        "source": "masks<b>.parquet", "chosen": side([0.1, 0.2, 0.3, 0.9, 0.4]),
        "rejected": side([0.1, 0.2, 0.8, 0.7, 0.6, 0.5]), **changes,
    }  # fmt: skip
    return token_record(CHOSEN, REJECTED, masks=masks)


def test_masks_are_shown_where_there_are_some(tmp_path: Path) -> None:
    html = page(tmp_path, with_masks())
    shown = blocks(html)
    assert len(shown) == 6  # two responses three times
    chosen, rejected = shown[4], shown[5]
    assert [token["text"] for token in chosen] == CHOSEN and [token["text"] for token in rejected] == REJECTED
    assert chosen[3]["title"] == "3 · ␣good: kept, mask 0.900"
    assert rejected[0]["title"] == "0 · The: left out, mask 0.100"
    # Differing: was, good | felt, long, Really; identical: The, film and . of both.
    assert "4 of 5 differing tokens (80.0%) and 1 of 6 identical tokens (16.7%)" in read(html).text
    assert "masks<b>.parquet" in read(html).text and "<b>" not in html
    assert len(blocks(page(tmp_path, token_record(CHOSEN, REJECTED)))) == 4


def test_a_record_of_before_there_were_masks_is_read(tmp_path: Path) -> None:
    write_token_record(tmp_path / "tokens.json", token_record(CHOSEN, REJECTED))
    whole = json.loads((tmp_path / "tokens.json").read_text("utf-8"))
    del whole["masks"]
    (tmp_path / "tokens.json").write_text(json.dumps(whole), "utf-8")
    assert read_token_record(tmp_path / "tokens.json")["masks"] is None
    assert len(blocks(write_token_report(tmp_path).read_text("utf-8"))) == 4


def test_masks_of_another_length_are_refused(tmp_path: Path) -> None:
    write_token_record(tmp_path / "tokens.json", with_masks(chosen={"mask": [0.5], "kept": [True]}))
    with pytest.raises(DataFileError, match=r"masks of chosen hold \{'mask': 1, 'kept': 1\}"):
        write_token_report(tmp_path)


def test_the_title_is_the_finding(tmp_path) -> None:
    record = token_record(CHOSEN, REJECTED)
    inner, scale = np.array(record["inner"]).sum(), (record["chosen"]["sq"] * record["rejected"]["sq"]) ** 0.5
    share = 100 * record["split"]["identical"] / inner
    title = re.search(r"<h1>(.*?)</h1>", page(tmp_path, record))[1]
    told = f"Pair {record['data']['row']}: its gradients have a cosine of {inner / scale:+.3f}"
    assert title == f"{told}, {share:.1f}% of it from tokens that both responses share"
    nearly = {**record, "split": {**record["split"], "identical": 1e-4 * scale, "differing": 0.0}}
    assert "<h1>Pair 3: its gradients have a cosine of 0.000</h1>" in page(tmp_path, nearly).replace(
        f"Pair {record['data']['row']}:", "Pair 3:"
    )
    zero = {**record, "chosen": {**record["chosen"], "sq": 0.0}}
    assert "a gradient is zero, so nothing ties the responses together</h1>" in page(tmp_path, zero)
