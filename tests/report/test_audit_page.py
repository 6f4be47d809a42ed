"""The page of an audit, from its records alone: every number where it belongs, whatever is missing or hostile."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradent.errors import DataFileError
from gradent.model.layer_names import layer_of
from gradent.record import (
    PAIR_COLUMNS,
    read_modules,
    read_pairs,
    read_sample,
    write_pairs,
    write_sample,
    write_summary,
    write_token_record,
)
from gradent.report import write_audit_report, write_report
from gradent.report.audit.sections.layers import kind_of
from gradent.report.audit.sections.records import read_audit
from gradent.report.audit.sections.steps import thin_out
from gradent.report.page.numbers import share_of_pairs, signed_number
from tests.report.audit_records import EVIL, HOSTILE, without_numbers, write_audit
from tests.report.browser import document, listening, needs_chromium
from tests.report.test_page import figures, read
from tests.report.token_records import token_record

SECTIONS = [
    "What happened", "Log-probs of chosen and rejected", "Cases", "Cosine of the two gradients",
    "Predicted against realised", "What if: other losses", "Which pairs", "What goes with entanglement", "Layers",
    "Tokens", "Settings and data",
]  # fmt: skip


def page(place: Path, count: int = 4, **asked: Any) -> str:
    write_audit(place, count, **asked)
    return write_audit_report(place).read_text("utf-8")


def text_of(html: str) -> str:
    return " ".join(read(html).text.split())


def attributes(html: str) -> set[str]:
    """Names of all attributes."""
    names: set[str] = set()
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attrs: names.update(name for name, _ in attrs)  # type: ignore[method-assign]
    reader.feed(html)
    return names


def titles(html: str) -> list[str]:
    return [unescape(each) for each in re.findall(r"<h2[^>]*>(.*?)</h2>", html)]


def traces(html: str, name: str) -> list[dict[str, Any]]:
    return [trace for figure in figures(html) for trace in figure["data"] if trace.get("name", "").startswith(name)]


def test_every_section_in_order_and_what_it_serves(tmp_path) -> None:
    html = page(tmp_path)
    assert titles(html) == SECTIONS
    assert html.count('class="serves">Tells you ') == html.count('<details class="section">') == len(SECTIONS) - 1
    assert "case 1 holds for" in text_of(html).split("Log-probs of chosen and rejected")[0], "on the first screen"


def test_what_steps_do_stands_before_what_a_pair_alone_would(tmp_path) -> None:
    html = page(tmp_path, with_steps=True)
    both = ["What moved the responses between checkpoints", "One step on the sample"]
    assert titles(html) == [*SECTIONS[:2], *both, *SECTIONS[2:]]
    text = text_of(html)
    first = text[: text.index("Log-probs of chosen and rejected")]
    assert "its own gradient +1.00, its rejected partner" in first and "explains 40.0% or more of the change" in first
    assert "the two disagree: the sample moves 30.0% of the chosen and 5.0% of the rejected responses" in text
    assert "Of 2 intervals (100 to 200, 200 to 300) it explains less than 90.0%" in text
    assert "inner products are off by 1.2% of" in text
    assert [trace["x"] for trace in traces(html, "partner")] == [[100, 200, 300, 400]] * 2


def test_where_nothing_moved_the_checkpoints_are_not_too_far_apart(tmp_path) -> None:
    steps = write_audit(tmp_path, with_steps=True)["steps"]
    still = [{**row, "explained": None} for row in steps["intervals"]]
    text = text_of(page(tmp_path, with_steps=True, steps={**steps, "intervals": still}))
    assert "No response moved." in text and "too far apart" not in text
    one = {**steps["intervals"][0], "explained": 0.955}
    text = text_of(page(tmp_path, with_steps=True, steps={**steps, "intervals": [one, *still[1:]]}))
    assert "It explains 95.5% or more of every interval." in text


def test_a_sample_that_agrees_with_each_pair_alone(tmp_path) -> None:
    steps = write_audit(tmp_path, with_steps=True)["steps"]
    agreeing = [{**row, "chosen_differs": 0.01, "rejected_differs": 0.02, "pairs": 1} for row in steps["sample"]]
    text = text_of(page(tmp_path, with_steps=True, steps={**steps, "sample": agreeing}))
    assert "the sample moves 1.0% of the chosen and 2.0% of the rejected responses the other way." in text
    assert "on the mean loss of the only pair" in text


def test_of_one_checkpoint_there_is_no_interval(tmp_path) -> None:
    html = page(tmp_path, count=1, with_steps=True)
    assert "One step on the sample" in titles(html)
    assert "What moved the responses between checkpoints" not in titles(html)
    assert not traces(html, "partner")


def test_the_first_screen_is_a_finding_its_chart_and_its_numbers(tmp_path) -> None:
    html = page(tmp_path)
    fall, curve = (read_audit(tmp_path).summary["dynamics"][name] for name in ("fall", "curve"))
    lost = {side: signed_number(fall[side]) for side in ("chosen", "rejected")}
    assert re.search(r"<h1>(.*?)</h1>", html)[1] == (
        f"Both fall since step 200: chosen {lost['chosen']}, rejected {lost['rejected']} nats"
    )
    chosen = next(trace for trace in figures(html)[0]["data"] if trace.get("name") == "chosen")
    assert chosen["x"] == [0, 100, 200, 300, 400] and chosen["y"] == [point["chosen"] for point in curve]
    assert [each["x0"] for each in figures(html)[0]["layout"]["shapes"]] == [200]
    numbers = html[html.index('<dl class="numbers">') :].split("</dl>")[0]
    assert f">{lost['chosen']} ± 0.500<" in numbers and ">75% [" in numbers and "since step 0<" in numbers
    cosine = read_audit(tmp_path).measured[-1].quantile("cosine", 0.5)
    assert f">{cosine:+.3f}<" in numbers


@pytest.mark.parametrize(
    ("chosen", "rejected", "title"),
    [
        (6.0, -39.0, "As meant, chosen rose and rejected fell: chosen +6.00, rejected -39.0 nats since step 0"),
        (6.0, 3.0, "Both rose: chosen +6.00, rejected +3.00 nats since step 0"),
        (-6.0, 3.0, "Reversed: chosen -6.00, rejected +3.00 nats since step 0"),
        (-6.0, -3.0, "Both lie lower than at step 0, but do not both fall now: chosen -6.00, rejected -3.00 nats"),
        (-60.0, -90.0, "Both lie lower than at step 0: chosen -60.0, rejected -90.0 nats"),
        (0.9, -3.0, "No clear change of chosen: chosen +0.900, rejected -3.00 nats since step 0"),
        (0.9, 0.1, "No clear change of chosen and rejected: chosen +0.900, rejected +0.100 nats since step 0"),
    ],
)
def test_the_title_says_what_the_curve_shows(chosen: float, rejected: float, title: str, tmp_path) -> None:
    moved = {**write_audit(tmp_path)["dynamics"], "fall": None}
    moved["curve"][-1] |= {"chosen": chosen, "rejected": rejected}
    assert re.search(r"<h1>(.*?)</h1>", page(tmp_path, dynamics=moved))[1] == title
    assert re.search(r"<h1>(.*?)</h1>", page(tmp_path, dynamics=moved, doubt="!"))[1] == f"In doubt: {title}"


def test_what_foretold_nothing_warns(tmp_path) -> None:
    found = write_audit(tmp_path)["recommendation"]
    foretold = {"from": 200, "to": 400, "pairs": 24, "chosen": 0.5, "rejected": 1.0}
    html = page(tmp_path, recommendation={**found, "foretold": foretold})
    shown = text_of(html)
    assert "right for chosen in 50% [31, 69] and for rejected in 100% [86, 100] of the pairs that it moves" in shown
    assert "for chosen that is no better than a coin." in shown
    assert '<div class="notice warns" role="note">\n<p><strong>How far to trust it' in html


def test_logps_are_means_with_errors_beside_the_trainers(tmp_path) -> None:
    html = page(tmp_path)
    columns = read_pairs(tmp_path / "pairs.parquet").to_pydict()
    steps, values = np.array(columns["step"]), np.array(columns["chosen_logp"])
    (line,) = traces(html, "chosen, measured")
    assert line["x"] == [0, 100, 200, 300, 400] and line["meta"] == "chosen"
    assert line["y"][0] == -60.0  # the reference, which is where the run started
    assert line["y"][1:] == pytest.approx([values[steps == step].mean() for step in line["x"][1:]])
    band = next(trace for trace in figures(html)[1]["data"] if trace.get("fill"))
    half = values[steps == 400].std(ddof=1) / np.sqrt((steps == 400).sum())
    assert band["y"][4] - line["y"][4] == pytest.approx(half)
    (logged,) = traces(html, "chosen, trainer's log")
    assert len(logged["x"]) == 40 and logged["line"]["dash"] == "dot" and logged["mode"] == "lines"
    shown = text_of(html)
    assert "both log-probs fall since step 200" in shown
    assert "In the trainer's log (logps/chosen and logps/rejected), they fall since step 10." in shown
    assert "over the batches it trained on" in shown
    assert [each["x0"] for each in figures(html)[1]["layout"]["shapes"]] == [200, 10]


@pytest.mark.parametrize("onset", [None, 300])
def test_the_onset_in_words(onset, tmp_path) -> None:
    summary = write_audit(tmp_path)
    moved = {**summary["dynamics"], "onset": {"measured": onset, "logged": None, "logged_keys": []}}
    shown = text_of(page(tmp_path, dynamics=moved))
    none = "the two log-probs do not both lie clearly below their best checkpoint."
    assert ("both log-probs fall since step 300." if onset else none) in shown
    assert "The trainer's log holds too few points of them to tell." in shown
    moved["onset"]["logged_keys"] = ["logps/chosen", "logps/rejected"]
    shown = text_of(page(tmp_path, dynamics=moved))
    assert "In the trainer's log (logps/chosen and logps/rejected), they do not clearly fall together." in shown
    shown = text_of(page(tmp_path, dynamics=moved | {"onset": {"measured": onset}}, history={"curves": {"loss": []}}))
    assert "The trainer's log holds no log-probs of chosen and rejected." in shown


def test_a_long_log_is_thinned_out_to_means() -> None:
    points = [[step, float(step % 2)] for step in range(4000)]
    x, y = thin_out(points)
    assert len(x) == len(y) == 400 and y == pytest.approx([0.5] * 400) and x[0] == 4.5
    assert thin_out([[10, None], [20, 1.0]])[1][1] == 1.0
    assert np.isnan(thin_out([[10, None]])[1]).all()


def test_cases_add_up_and_cosines_have_quartiles(tmp_path) -> None:
    html = page(tmp_path)
    parts = [trace for trace in figures(html)[2]["data"] if trace["stackgroup"] == "all"]
    assert [trace["meta"] for trace in parts] == ["ideal", "both_down", "both_up", "reversed", "inactive"]
    assert np.sum([trace["y"] for trace in parts], 0) == pytest.approx(np.ones(4))
    columns = read_pairs(tmp_path / "pairs.parquet").to_pydict()
    last = [
        value
        for value, step in zip(columns["cosine"], columns["step"], strict=True)
        if step == 400 and value is not None
    ]
    (line,) = traces(html, "median, band")
    band = next(trace for trace in figures(html)[3]["data"] if trace.get("fill"))
    assert [band["y"][4], line["y"][3], band["y"][3]] == pytest.approx(np.percentile(last, [25, 50, 75]))
    (bars,) = traces(html, "pairs")
    assert sum(bars["y"]) == len(last) == 23
    assert "1 pair without one: a gradient is exactly zero" in text_of(html)


def test_predicted_against_realised(tmp_path) -> None:
    html = page(tmp_path)
    body = html[html.index('id="s5"') :].split('id="s6"')[0]
    assert "whole run, 100 to 400" in body and "100 to 200" in body
    assert body.count("42.0%") == 4 and "0.0130" in body and "80.0%" in body


def test_many_intervals_are_folded(tmp_path) -> None:
    html = page(tmp_path, 12)
    assert "11 intervals, from checkpoint to checkpoint</summary>" in html
    assert html.index("whole run, 100 to 1,200") < html.index("100 to 200")


def test_one_checkpoint_of_a_run_still_shows_what_was_logged(tmp_path) -> None:
    summary = write_audit(tmp_path)
    kept = {name: summary[name] for name in ("run", "history")}
    onset = {"measured": None, "logged": 10, "logged_keys": ["logps/chosen", "logps/rejected"]}
    start = {"chosen_logp": -60.0, "rejected_logp": -60.0}
    moved = {"onset": onset, "start": start, "intervals": [], "whole": None, "cases_realised": None}
    html = page(tmp_path, 1, **kept, dynamics=moved)
    (logged,) = traces(html, "chosen, trainer's log")
    assert len(logged["x"]) == 40 and "they fall since step 10." in text_of(html)
    assert "Predicted against realised" not in titles(html)


def test_other_losses_as_bars_and_table(tmp_path) -> None:
    html = page(tmp_path)
    body = html[html.index('id="s6"') :].split('id="s7"')[0]
    bars = [trace for trace in traces(html, "case 1") if trace.get("type") == "bar"]
    # The run's, eight of ten in the paper (one is the run's own, one has no numbers), the designs.
    assert len(bars[0]["x"]) == 11 and sum(name.startswith("DPO (β=0.1)") for name in bars[0]["customdata"]) == 1
    assert bars[0]["customdata"][0] == "DPO (β=0.1), this run's" and bars[0]["x"][-1] == 1.0
    assert "log-probs, and none were measured." in body
    assert "4 more settings: hyperparameters varied one at a time</summary>" in body
    for text in ("0.700", "1.40", "40.0%", "by construction"):
        assert text in body


def test_pairs_at_both_ends_with_texts(tmp_path) -> None:
    html = page(tmp_path)
    last = read_audit(tmp_path).measured[-1]
    order = np.argsort(-np.nan_to_num(last.columns["cosine"], nan=-9), kind="stable")
    body = html[html.index('id="s7"') :].split('id="s8"')[0]
    rows = re.findall(r"<th scope=row><span>(\d+)</span>", body)
    assert rows[:8] == [str(last.pairs[place]) for place in order[:8]]
    assert rows[8] == str(last.pairs[order[-2]])  # the last one has no cosine
    assert (
        f"It was a quiet joy ({rows[0]})." in body and f"Row {rows[0]} (pairs.jsonl:{int(rows[0]) + 1}): prompt" in body
    )
    assert len(set(rows)) == 16


def test_few_pairs_are_at_one_end_only(tmp_path) -> None:
    html = page(tmp_path, pairs=3)
    body = html[html.index('id="s7"') :].split('id="s8"')[0]
    assert sorted(re.findall(r"<th scope=row><span>(\d+)</span>", body)) == ["0", "3", "6"]
    assert "The least entangled pairs" not in body


@pytest.mark.parametrize(
    ("module", "layer", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "mlp.up_proj"),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.default", "model.layers.3", "mlp.up_proj"),
        ("model.layers.0.mlp.experts.7.down_proj.base_layer", "model.layers.0", "mlp.experts.down_proj"),
        ("module.lm_head.modules_to_save.default", "lm_head", "lm_head"),
        ("transformer.h.2", "transformer.h.2", "the layer itself"),
        ("", "", ""),
    ],
)
def test_layers_and_kinds(module, layer, kind) -> None:
    assert (layer_of(module), kind_of(module)) == (layer, kind)


def test_layers_add_up_to_the_mean_cosine(tmp_path) -> None:
    html = page(tmp_path)
    (heat,) = [trace for figure in figures(html) for trace in figure["data"] if trace.get("type") == "heatmap"]
    assert heat["y"] == ["layer 0", "layer 1", "layer 2", "layer 3", "model.embed_tokens"]
    assert heat["x"] == ["100", "200", "300", "400"]
    means = [each.mean("cosine") for each in read_audit(tmp_path).measured]
    assert np.sum(heat["z"], 0) == pytest.approx(means, abs=1e-3)
    assert heat["zmax"] == pytest.approx(np.abs(heat["z"]).max(), abs=1e-4)
    columns = read_modules(tmp_path / "modules.parquet").to_pydict()
    rows = [row for row, step in enumerate(columns["step"]) if step == 400]
    up = sum(columns["cosine_part"][row] for row in rows if "up_proj" in columns["module"][row])
    assert re.search(rf"mlp\.up_proj</span></th><td class=\"num\"><span>{re.escape(f'{up:+.3f}')}", html)


def test_tokens_of_a_few_pairs_are_coloured(tmp_path) -> None:
    html = page(tmp_path)
    assert html.count('<div class="words"') == 4
    shown = text_of(html)
    assert "Over 2 pairs spread over all cosines." in shown and "of the cosine), identical" in html


def test_without_the_optional_files(tmp_path) -> None:
    shown = text_of(page(tmp_path, with_modules=False, with_sample=False, token_pairs=0))
    assert "`gradent audit ... --token-pairs 8` measures those of eight pairs." in shown
    assert "Modules were not measured" in shown and "--no-by-module" in shown
    assert "sample.parquet, which is not beside this page" in shown
    assert "quiet joy" in shown  # the few texts that the summary has


def test_a_partial_audit_says_so_first(tmp_path) -> None:
    left = [{"checkpoint": "checkpoint-300", "step": 300, "reason": "no weights in it"}]
    html = page(tmp_path, complete=False, left_out=left)
    shown = text_of(html)
    assert shown.index("This audit is not complete.") < shown.index("What to do")
    assert "1 checkpoint could not be measured checkpoint-300 (step 300): no weights in it" in shown
    assert html.count('class="notice warns"') == 2
    assert 'class="notice warns"' not in page(tmp_path)


def test_checkpoints_with_fewer_pairs(tmp_path) -> None:
    write_audit(tmp_path, complete=False)
    columns = read_pairs(tmp_path / "pairs.parquet").to_pydict()
    write_pairs(tmp_path / "pairs.parquet", {name: values[:-10] for name, values in columns.items()})
    assert "14 pairs of" in write_audit_report(tmp_path).read_text("utf-8")


def test_a_single_model(tmp_path) -> None:
    html = page(tmp_path, count=1)
    rest = [title for title in SECTIONS[1:] if title != "Predicted against realised"]
    assert titles(html) == ["The answer", *rest]
    shown = text_of(html)
    assert not traces(html, "chosen, measured") and "24 pairs of" in shown and "on one model; dpo" in shown
    assert re.search(r"<h1>A small step on each pair alone raises chosen and lowers rejected in \d+% \[", html)
    assert [trace["type"] for trace in figures(html)[0]["data"]] == ["bar"] * 5
    assert "now step" not in html
    for word in ("this run", "the run", "last checkpoint", "since when", "What moved it", "were to be measured"):
        assert word not in shown, word
    assert "from these weights" in shown and "DPO (β=0.1), the loss asked about" in html
    assert "24 of the data's 72 rows were measured." in shown


def test_of_a_single_model_the_step_on_the_sample_is_the_finding(tmp_path) -> None:
    html = page(tmp_path, count=1, with_steps=True)
    shown = text_of(html)
    title = (
        "A small step on all 24 pairs raises chosen and lowers rejected in 20% [9, 40], and lowers both in 20% [9, 40]"
    )
    assert f"<h1>{title}</h1>" in html and "What would move them" in shown
    alone = share_of_pairs(read_audit(tmp_path).measured[-1].share("both_down"), 24)
    assert f"a step on all 24 pairs; on each alone {alone}" in shown
    steps = {**read_audit(tmp_path).summary["steps"], "sample": []}
    assert "<h1>A small step on each pair alone raises" in page(tmp_path, count=1, with_steps=True, steps=steps)


def test_a_reference_that_is_the_model_itself_is_not_shown_beside_it(tmp_path) -> None:
    assert "Reference, chosen" in text_of(page(tmp_path, count=1))
    own = text_of(page(tmp_path, count=1, reference={"kind": "self", "source": None}))
    assert "Reference, chosen" not in own and "Mean log-probs of whole responses" in own


def test_a_property_that_is_the_same_in_all_pairs_is_named_and_left_out(tmp_path) -> None:
    rows = write_audit(tmp_path)["properties"]
    reason = "the property is the same for all pairs"
    same = {**rows[0], "label": "Margin of nothing", "spearman": None, "reason": reason, "groups": []}
    shown = text_of(page(tmp_path, properties=[*rows, same]))
    assert "Left out, for it is the same in all pairs: Margin of nothing." in shown and reason not in shown


def test_counts_are_whole(tmp_path) -> None:
    table = page(tmp_path, count=1).split("<caption><span>Over the pairs (pairs by cosine)")[1].split("</table>")[0]
    counts = re.findall(r"<span>(\d[\d.,]*)</span></td>", table)
    assert len(counts) == 24 and sum(map(int, counts)) == 23  # one pair has no cosine


@pytest.mark.parametrize("count", [1, 4])
def test_numbers_that_do_not_exist(count, tmp_path) -> None:
    summary = write_audit(tmp_path, count)
    html = page(tmp_path, count, **(without_numbers(summary) if count > 1 else {"recommendation": None}))
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert "None" not in read(own).text and "nan" not in read(own).text
    assert "There is no recommendation" in html


def test_nothing_measured(tmp_path) -> None:
    summary = write_audit(tmp_path)
    write_pairs(tmp_path / "pairs.parquet", {name: [] for name in PAIR_COLUMNS})
    for name in ("modules", "sample", "tokens"):
        (tmp_path / f"{name}.parquet").unlink()
    empty = {"what_if": [], "recommendation": None, "properties": [], "dynamics": None, "history": None,
             "checkpoints": [], "most_entangled": [], "tokens": None, "complete": False}  # fmt: skip
    write_summary(tmp_path / "summary.json", {**summary, **empty})
    html = write_audit_report(tmp_path).read_text("utf-8")
    assert figures(html) == [] and "No pair was measured." in html


def test_keyboards_and_screen_readers_are_served(tmp_path) -> None:
    html = page(tmp_path)
    shown = read(html)
    assert html.index('<a class="skip" href="#main">') < html.index("<header>") < html.index('<main id="main"')
    assert [shown.tags.count(tag) for tag in ("h1", "main", "header", "nav", "footer")] == [1, 1, 1, 0, 1]
    assert shown.tags.count("section") == html.count('aria-labelledby="s') == len(SECTIONS)
    assert html.count("<summary><h2 id=") == len(SECTIONS) - 1  # what is folded is its own list of contents
    charts = re.findall(r'<div class="chart[^>]*role="img" aria-label="([^"]+)"', html)
    assert len(charts) == len(figures(html)) == html.count('<details class="data">')
    assert any("chosen, measured: -60.0 at 0" in each for each in charts)
    assert html.count("<th scope=row>") > 50 and html.count('<th scope="col"') > 50
    tables = re.findall(r"<table.*?</table>", html, flags=re.DOTALL)
    assert all("<caption>" in table for table in tables)
    assert "@media print" in html and "prefers-color-scheme: dark" in html


def test_hostile_texts_are_inert_in_the_source(tmp_path) -> None:
    html = page(tmp_path, count=3, hostile=EVIL, with_steps=True)
    shown = read(html)
    plain = read(page(tmp_path / "plain", count=3, with_steps=True))
    assert shown.tags.count("script") == plain.tags.count("script")
    assert not {"img", "b", "iframe", "link"} & set(shown.tags)
    assert shown.loads == [] and shown.policy.startswith("default-src 'none'")
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not set("\u202e\u2066\x00\x1b") & set(own)
    for figure in figures(html):
        for trace in figure["data"]:
            assert not any("<" in str(trace.get(key, "")) for key in ("name", "customdata", "x", "y"))
    assert "{{7*7}}" in shown.text and "\\u202eabc" in shown.text


@needs_chromium
def test_hostile_texts_are_inert_in_a_browser(tmp_path) -> None:
    with listening() as (address, asked):
        evil = EVIL + f"<img src={address}/image><link rel=stylesheet href={address}/style>url({address}/url)"
        write_audit(tmp_path / "audit", 3, hostile=evil, with_steps=True)
        found = document(write_audit_report(tmp_path / "audit"), tmp_path / "profile")
        shown = read(found)
        assert re.search(r"<title>(.*?)</title>", found, re.DOTALL)[1].startswith("Both fall since step 200")
        assert "main-svg" in found, "the figures are drawn"
        assert not {"img", "b", "iframe", "link"} & set(shown.tags)
        assert not [name for name in attributes(found) if name.startswith("on")]
        assert asked == []


@needs_chromium
def test_the_check_in_a_browser_can_fail(tmp_path) -> None:
    with listening() as (address, asked):
        evil = "".join(HOSTILE) + f"<img src={address}/image>"
        (tmp_path / "page.html").write_text(f"<title>as it was</title><p>{evil}</p>", "utf-8", errors="replace")
        found = document(tmp_path / "page.html", tmp_path / "profile")
        assert "<title>ran</title>" in found and "onerror" in attributes(found)
        assert asked == ["/image"]


def test_a_large_audit_is_a_page_of_bounded_size(tmp_path) -> None:
    html = page(tmp_path, count=40, pairs=2000)
    assert len(html.encode()) < 8_000_000


def test_long_texts_are_cut(tmp_path) -> None:
    write_audit(tmp_path)
    columns = read_sample(tmp_path / "sample.parquet").to_pydict()
    write_sample(tmp_path / "sample.parquet", {**columns, "prompt": ["<&\x00" * 100_000] * 24})
    html = write_audit_report(tmp_path).read_text("utf-8")
    assert len(html.encode()) < 8_000_000
    assert "(295,000 more characters are in sample.parquet)" in html


def test_what_a_directory_holds_is_written_anew(tmp_path) -> None:
    write_audit(tmp_path)
    write_token_record(tmp_path / "tokens.json", token_record(["a"], ["b"]))
    names = [path.relative_to(tmp_path).as_posix() for path in write_report(tmp_path)]
    assert names[:2] == ["report.html", "figures/logps.png"] and names[-1] == "tokens.html"
    assert all((tmp_path / name).stat().st_size for name in names)


def test_a_directory_without_records(tmp_path) -> None:
    with pytest.raises(DataFileError, match=r"Looked for: summary\.json \(`gradent audit`\), demo\.json.*tokens\.json"):
        write_report(tmp_path)
    with pytest.raises(DataFileError, match="no such directory"):
        write_report(tmp_path / "missing")
    write_audit(tmp_path)
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(DataFileError, match=r"whose pages and tables have the same names"):
        write_report(tmp_path)


def test_reports_need_no_torch(tmp_path) -> None:
    write_audit(tmp_path)
    source = (
        f"import sys\nfrom gradent.report import write_report, write_comparison\nwrite_report({str(tmp_path)!r})\n"
        f"write_comparison({str(tmp_path)!r}, {str(tmp_path)!r}, {str(tmp_path / 'compare.html')!r})\n"
        "print(sorted({'torch', 'transformers', 'wandb', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
