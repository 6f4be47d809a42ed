"""A prompt that is in the responses once more: counted in the notes, and the first thing in what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradent import audit
from tests.auditing.made import FORMATS, write_jsonl

TWICE = {
    name: [{**row, **{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}} for row in FORMATS[name][:5]]
    for name in ("strings", "messages")
}


@pytest.mark.parametrize("name", TWICE)
def test_it_comes_before_any_other_loss(name, local_model: Path, tmp_path) -> None:
    texts = []
    for rows in (TWICE[name], FORMATS[name][:5]):
        data = write_jsonl(tmp_path / "pairs.jsonl", rows)
        summary = audit(
            local_model, data=data, loss="ipo", out=tmp_path / f"out{len(texts)}", attribution=False, report=not texts,
            quiet=True,
        ).summary  # fmt: skip
        texts.append(summary["recommendation"]["text"])
        assert any("pairs chosen begins with the prompt" in note for note in summary["notes"]) == (len(texts) == 1)
    count = 4 if name == "strings" else 5  # of fewer than 4 letters ("So") nobody can say
    first = (
        f"First the data: in {count} of 5 pairs chosen begins with the prompt, which is there already; take it out of"
    )
    assert texts[0].startswith(first) and "First the data" not in texts[1]
    page = (tmp_path / "out0" / "report.html").read_text("utf-8")
    assert f"First the data: in {count} of 5 pairs" in page
