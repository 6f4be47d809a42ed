"""Two audits side by side: the same pairs found, differences paired, and said where they are not."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from gradent.errors import DataFileError, InputError
from gradent.record import PAIR_COLUMNS, read_pairs, read_sample, write_pairs, write_sample
from gradent.report import compare_rows, print_comparison, write_audit_report, write_comparison
from gradent.report.compare.match import compare_audits, describe_finding
from gradent.report.compare.page import describe_difference
from tests.report.audit_records import EVIL, write_audit
from tests.report.browser import document, listening, needs_chromium
from tests.report.test_audit_page import attributes, text_of, titles
from tests.report.test_page import figures, read


@pytest.fixture
def both(tmp_path):
    """Two audits of the same pairs; in the second, cosines and log-probs are others."""
    write_audit(tmp_path / "a")
    write_audit(tmp_path / "b", loss={"name": "cpo", "beta": 0.1, "lam": 0.5})
    columns = read_pairs(tmp_path / "b" / "pairs.parquet").to_pydict()
    draw = np.random.default_rng(3)
    columns["cosine"] = [None if each is None else each - 0.2 + 0.1 * draw.normal() for each in columns["cosine"]]
    columns["case"] = [1 if draw.random() < 0.7 else each for each in columns["case"]]
    columns["chosen_logp"] = [each + 5 + draw.normal() for each in columns["chosen_logp"]]
    write_pairs(tmp_path / "b" / "pairs.parquet", columns)
    return tmp_path / "a", tmp_path / "b"


def last_of(place, name):
    columns = read_pairs(place / "pairs.parquet").to_pydict()
    rows = zip(columns["step"], columns[name], strict=True)
    return np.array([np.nan if value is None else value for step, value in rows if step == 400])


def test_differences_are_paired(both) -> None:
    rows = {row.name: row for row in compare_rows(*both)}
    difference = last_of(both[1], "cosine") - last_of(both[0], "cosine")
    there = difference[np.isfinite(difference)]
    row = rows["mean cosine"]
    assert row.pairs == 23 and row.difference == pytest.approx(there.mean())
    assert row.error == pytest.approx(there.std(ddof=1) / np.sqrt(23))
    assert row.second - row.first == pytest.approx(row.difference)
    ideal = [(last_of(place, "case") == 1).astype(float) for place in both]
    row = rows["share in case 1 (ideal)"]
    assert (row.first, row.second) == pytest.approx((ideal[0].mean(), ideal[1].mean())) and row.share
    assert row.error == pytest.approx((ideal[1] - ideal[0]).std(ddof=1) / np.sqrt(24))
    assert rows["mean log π(chosen), nats"].difference == pytest.approx(5, abs=1)
    assert rows["median cosine"].second == pytest.approx(np.nanmedian(last_of(both[1], "cosine")))


def test_transitions_are_counted(both) -> None:
    found = compare_audits(*both).transitions
    before, after = (last_of(place, "case") for place in both)
    assert sum(found.values()) == 24
    assert found["both_down", "ideal"] == int(((before == 2) & (after == 1)).sum()) > 0


def test_the_page(both, tmp_path) -> None:
    path = write_comparison(*both, tmp_path / "new" / "both.html")
    assert path == tmp_path / "new" / "both.html"
    html = path.read_text("utf-8")
    assert titles(html) == [
        "What differs in the settings", "Differences", "Cases", "Log-probs over steps", "Cosines over steps",
        "What if: other losses", "Which pairs moved",
    ]  # fmt: skip
    shown = text_of(html)
    assert "24 pairs were measured in both, matched by row and text." in shown
    assert "13 of the 13 losses judge both alike and are left out." in shown  # the run's own, ten, two designs
    settings = html[html.index('id="s1"') :].split('id="s2"')[0]
    assert "dpo (beta=0.1)" in settings and "cpo (beta=0.1, lam=0.5)" in settings and "max_length" not in settings
    names = [trace["name"] for trace in figures(html)[1]["data"] if "name" in trace]
    assert names == ["A: chosen", "A: rejected", "B: chosen", "B: rejected"]
    lines = {trace["name"]: trace for trace in figures(html)[1]["data"] if "name" in trace}
    assert [lines[name]["meta"] for name in names] == ["chosen", "rejected"] * 2, "colour by response"
    assert lines["B: chosen"]["line"]["dash"] == "dot" and "dash" not in lines["A: chosen"].get("line", {})
    assert write_comparison(*both, tmp_path) == tmp_path / "compare.html"


def test_the_finding_is_what_differs_most(tmp_path) -> None:
    for name in "ab":
        write_audit(tmp_path / name)
    columns = read_pairs(tmp_path / "b" / "pairs.parquet").to_pydict()
    columns["case"] = [4 if case == 1 else case for case in columns["case"]]
    write_pairs(tmp_path / "b" / "pairs.parquet", columns)
    ideal = int((last_of(tmp_path / "a", "case") == 1).sum())
    rows = {row.name: row for row in compare_rows(tmp_path / "a", tmp_path / "b")}
    assert rows["share in case 4 (reversed)"].difference == pytest.approx(ideal / 24)
    assert sum(row.second for row in rows.values() if row.share) == pytest.approx(1), "every case has a row"
    found = describe_finding(compare_audits(tmp_path / "a", tmp_path / "b"))
    points = f"{100 * ideal / 24:.0f}"
    assert found.startswith(f"B has {points} points fewer of the pairs in case 1 (ideal) than A")
    columns["case"] = [4] * len(columns["case"])
    write_pairs(tmp_path / "b" / "pairs.parquet", columns)
    assert "pairs are reversed in B" in describe_finding(compare_audits(tmp_path / "a", tmp_path / "b"))


def test_the_finding_is_of_log_probs_where_cases_are_alike(tmp_path) -> None:
    for name in "ab":
        write_audit(tmp_path / name)
    columns = read_pairs(tmp_path / "b" / "pairs.parquet").to_pydict()
    columns["chosen_logp"] = [each + 5 + 0.1 * (row % 3) for row, each in enumerate(columns["chosen_logp"])]
    write_pairs(tmp_path / "b" / "pairs.parquet", columns)
    found = describe_finding(compare_audits(tmp_path / "a", tmp_path / "b"))
    assert re.fullmatch(r"Mean (margin )?log π\(chosen\).* is 5\.\d+ nats higher in B", found)


def test_an_audits_own_page_is_not_overwritten(both) -> None:
    page = write_audit_report(both[0])
    before = page.read_bytes()
    with pytest.raises(InputError, match=r"report\.html: is the page of an audit"):
        write_comparison(*both, page)
    assert page.read_bytes() == before


def test_rows_with_other_texts_are_left_out(both) -> None:
    columns = read_sample(both[1] / "sample.parquet").to_pydict()
    columns["chosen"][:4] = ["something else"] * 4
    write_sample(both[1] / "sample.parquet", columns)
    found = compare_audits(*both)
    assert len(found.places) == 20 and found.rows[0].pairs == 19
    assert "4 rows that both measured differ in their texts and are left out." in found.matching


def test_rows_alone_where_texts_are_missing(both) -> None:
    (both[0] / "sample.parquet").unlink()
    found = compare_audits(*both)
    assert len(found.places) == 24 and "matched by row alone" in found.matching


@pytest.mark.parametrize("texts", [True, False])
def test_other_data_is_said_and_differences_are_not_paired(texts, tmp_path) -> None:
    write_audit(tmp_path / "a")
    summary = write_audit(tmp_path / "b", pairs=30, seed=5, with_sample=texts)
    if texts:
        columns = read_sample(tmp_path / "b" / "sample.parquet").to_pydict()
        write_sample(tmp_path / "b" / "sample.parquet", {**columns, "prompt": ["another"] * 30})
    else:
        write_audit(tmp_path / "b", pairs=30, seed=5, with_sample=False, data={**summary["data"], "source": "other"})
    found = compare_audits(tmp_path / "a", tmp_path / "b")
    assert not found.places and "not paired" in found.matching and not found.transitions
    row = found.rows[0]
    errors = [last_of(tmp_path / name, "cosine") for name in "ab"]
    errors = [each[np.isfinite(each)].std(ddof=1) / np.sqrt(np.isfinite(each).sum()) for each in errors]
    assert row.pairs is None and row.error == pytest.approx(np.hypot(*errors))
    html = write_comparison(tmp_path / "a", tmp_path / "b", tmp_path / "x.html").read_text("utf-8")
    assert "Not the same pairs" in html and "Which pairs moved" not in html


def test_single_models_and_nothing_measured(tmp_path) -> None:
    write_audit(tmp_path / "a", 1)
    write_audit(tmp_path / "b", 1, complete=False)
    html = write_comparison(tmp_path / "a", tmp_path / "b", tmp_path / "x.html").read_text("utf-8")
    assert "Log-probs over steps" not in titles(html) and "B is not complete." in html
    write_pairs(tmp_path / "b" / "pairs.parquet", {name: [] for name in PAIR_COLUMNS})
    html = write_comparison(tmp_path / "a", tmp_path / "b", tmp_path / "x.html").read_text("utf-8")
    assert "One of the audits measured nothing." in html


def test_an_audit_beside_itself(tmp_path) -> None:
    write_audit(tmp_path)
    html = write_comparison(tmp_path, tmp_path, tmp_path / "x.html").read_text("utf-8")
    assert "<h1>No clear difference between the two</h1>" in html
    assert "Nothing: all settings are the same." in html and "Which pairs moved" not in titles(html)
    assert all(row.difference == 0 for row in compare_rows(tmp_path, tmp_path))


def test_differences_in_words(both) -> None:
    rows = {row.name: describe_difference(row) for row in compare_rows(*both)}
    assert re.fullmatch(r"-0\.\d+ ± 0\.\d+", rows["mean cosine"])
    assert re.fullmatch(r"\+[\d.]+ ± [\d.]+ points", rows["share in case 1 (ideal)"])
    assert "±" not in rows["median cosine"]


def test_the_terminal(both) -> None:
    out = io.StringIO()
    print_comparison(*both, Console(file=out, width=120))
    shown = out.getvalue()
    assert shown.index("dpo (beta=0.1)") < shown.index("24 pairs were measured in both") < shown.index("mean cosine")
    write_audit(both[1], hostile=EVIL + "[bold]x[/bold]")
    print_comparison(*both, Console(file=out, width=120, force_terminal=False))
    assert not set("\x1b\u202e\x00") & set(out.getvalue())


def test_a_missing_record_is_named(tmp_path) -> None:
    write_audit(tmp_path / "a")
    with pytest.raises(DataFileError, match=r"b/summary\.json: there is no such file"):
        write_comparison(tmp_path / "a", tmp_path / "b", tmp_path / "x.html")


@needs_chromium
def test_hostile_texts_are_inert_in_a_browser(tmp_path) -> None:
    with listening() as (address, asked):
        for name, seed in (("a", 0), ("b", 1)):
            write_audit(tmp_path / name, hostile=f"{EVIL}<img src={address}/{name}>", seed=seed, loss={"name": EVIL})
        page = write_comparison(tmp_path / "a", tmp_path / "b", tmp_path / "compare.html")
        found = document(page, tmp_path / "profile")
        assert re.search(r"<title>(B has|Mean|No clear)", found) and "main-svg" in found
        assert not {"img", "b", "iframe", "link"} & set(read(found).tags)
        assert not [name for name in attributes(found) if name.startswith("on")]
        assert asked == []
