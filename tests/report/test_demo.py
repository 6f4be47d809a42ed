"""The demo's page from records alone."""

from __future__ import annotations

import re

import pytest

from gradent.demo.findings import judge
from gradent.demo.task import STYLES
from gradent.errors import DataFileError
from gradent.record import write_demo, write_pairs
from gradent.report import write_demo_report
from tests.demo.rows import AS_IN_THE_PAPER, make_rows

SETTINGS = {
    "seed": 0, "probe": 6, "sft_steps": 1, "sft_batch": 1, "sft_lr": 0.1, "dpo_steps": 10, "dpo_batch": 1,
    "dpo_lr": 0.1, "dpo_optimizer": "sgd", "beta": 0.1, "measure_every": 5,
}  # fmt: skip


def write_records(place, ends, source="my <b>model</b>"):
    columns = make_rows(ends)
    write_pairs(place / "pairs.parquet", columns)
    record = {
        "model": {"source": source, "architecture": "Tiny", "parameters": 10, "label_words": ["yes", "no"]},
        "settings": SETTINGS,
        "styles": [{"style": style, "prompt": "p", "chosen": " yes", "rejected": " no"} for style in STYLES],
        "findings": [finding.to_record() for finding in judge(columns)],
        "seconds": 1.0,
    }
    write_demo(place / "demo.json", record)


def text_of(html: str) -> str:
    body = re.sub(r"<script.*?</script>|<style.*?</style>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_measured_numbers_are_shown(tmp_path):
    write_records(tmp_path, AS_IN_THE_PAPER)
    shown = text_of(write_demo_report(tmp_path).read_text("utf-8"))
    assert "6 of the paper's 6 findings" in shown.replace("&#39;", "'")
    assert "single token: +0.500 ± 0.008" in shown
    assert "does not appear" not in shown
    assert "<h1>6 of the paper&#39;s 6 findings appear in this run</h1>" in (tmp_path / "report.html").read_text(
        "utf-8"
    )
    assert shown.index("Of one held-out statement") < shown.index("A finding appears if")
    assert "my &lt;b&gt;model&lt;/b&gt;" in shown


def test_what_does_not_appear_is_said(tmp_path):
    write_records(tmp_path, AS_IN_THE_PAPER | {"single token": (-1.5, -3.0, 0.2)})
    shown = text_of(write_demo_report(tmp_path).read_text("utf-8"))
    assert shown.count("does not appear") == 2
    assert "single token: -0.500" in shown


def test_a_style_that_is_ideal_alone_and_falls_is_named(tmp_path):
    write_records(tmp_path, AS_IN_THE_PAPER)
    shown = text_of(write_demo_report(tmp_path).read_text("utf-8"))
    assert "chosen can fall" not in shown  # the ideal style's chosen rises
    write_records(tmp_path, AS_IN_THE_PAPER | {"single token": (-1.5, -3.0, 0.2)})
    shown = text_of(write_demo_report(tmp_path).read_text("utf-8"))
    assert "fall where most pairs are ideal: single token (100% ideal, chosen -0.500 nats)." in shown


def test_an_undefined_cosine_is_a_gap(tmp_path):
    write_records(tmp_path, AS_IN_THE_PAPER | {"single token": (-0.5, -3.0, None)})
    html = write_demo_report(tmp_path).read_text("utf-8")
    assert "no value" in text_of(html)
    assert "NaN" not in "".join(re.findall(r'class="figure">(.*?)</script>', html, flags=re.DOTALL))


def test_missing_records_are_named(tmp_path):
    with pytest.raises(DataFileError, match=r"pairs\.parquet"):
        write_demo_report(tmp_path)
