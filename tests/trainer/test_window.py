"""From measured steps to the plain window that words and panels are made from."""

from __future__ import annotations

import io
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback
from gradent.attribution.step import StepAttribution
from gradent.notices import log
from gradent.record import MOVED_COLUMNS, MOVED_SOURCES, PAIR_COLUMNS, UNSPLIT
from gradent.record.stream import read_stream
from gradent.report.live.alerts import Alert, describe
from gradent.trainer.records.step import StepRecord, share_explained, summarize, summarize_moves, to_rows
from gradent.trainer.records.window import to_window
from tests.trainer.runs import data_for, llama, make_trainer, preferences


@pytest.fixture
def callback(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> EntanglementCallback:
    callback = EntanglementCallback(every=1, realised=True, alert=None)
    make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback], learning_rate=1e-4).train()
    return callback


def test_a_window_of_two_steps(callback: EntanglementCallback, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    records = list(callback.records)
    window = to_window(records, tiny_tokenizer)
    assert window.steps == [1, 2] and window.pairs == [4, 4]
    assert [sum(shares.values()) for shares in window.cases] == [1.0, 1.0]
    for case in ("ideal", "both_down", "both_up", "reversed"):
        assert window.share(case) == pytest.approx(summarize(records)[f"gradent/case/{case}"])
    assert len(window.predicted) == len(window.realised) == 8
    assert window.predicted[5][0] == records[1].verdict.chosen_change[1]
    assert window.realised[5][1] == records[1].rejected_realised[1]
    inner = sum(float(record.gram.inner.sum()) for record in records)
    assert sum(window.layer_inner.values()) == pytest.approx(inner)
    assert list(window.layer_cosines) == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]
    assert all(len(cosines) == 2 for cosines in window.layer_cosines.values())
    down = [record.verdict.case == 2 for record in records]
    assert len(window.chosen_needs) == len(window.weight_ratio) == sum(int(which.sum()) for which in down)


def without_account(record: StepRecord) -> StepRecord:
    return replace(record, attribution=None)


def test_what_moved_both_sides(callback: EntanglementCallback) -> None:
    records = list(callback.records)
    window = to_window(records, None)
    assert list(window.moved) == ["chosen", "rejected"]
    for place, side in enumerate(("chosen", "rejected")):
        assert tuple(window.moved[side]) == MOVED_SOURCES
        for source, values in window.moved[side].items():
            half = slice(4 * place, 4 * place + 4)
            assert values == [pytest.approx(float(record.attribution.moved[source][half].mean())) for record in records]
    assert len(window.accounted) == len(window.realised) == 8
    for step, record in enumerate(records):
        for pair in range(4):
            want = record.attribution.total[pair], record.attribution.total[4 + pair]
            assert window.accounted[4 * step + pair] == want
            want = record.chosen_realised[pair], record.rejected_realised[pair]
            assert window.realised[4 * step + pair] == want
    assert (
        window.explained == summarize(records)["gradent/explained"] == share_explained([r.attribution for r in records])
    )
    assert window.accounted_places == [0, 1]
    for source, values in window.moved["chosen"].items():
        assert window.moved_mean("chosen", [1])[source] == values[1]
        assert window.moved_mean("chosen", [0, 1])[source] == pytest.approx(sum(values) / 2)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_step_without_an_account_leaves_a_gap(missing: int, callback: EntanglementCallback) -> None:
    records = list(callback.records)
    whole = to_window(records, None)
    records[missing] = without_account(records[missing])
    window = to_window(records, None)
    there = 1 - missing
    assert window.accounted_places == [there]
    for side, columns in window.moved.items():
        for source, values in columns.items():
            assert math.isnan(values[missing]) and values[there] == whole.moved[side][source][there]
    assert len(window.accounted) == len(window.realised) == 8
    gap, kept = slice(4 * missing, 4 * missing + 4), slice(4 * there, 4 * there + 4)
    assert all(math.isnan(chosen) and math.isnan(rejected) for chosen, rejected in window.accounted[gap])
    assert window.accounted[kept] == whole.accounted[kept]
    assert window.explained == records[there].attribution.explained


def test_no_account_at_all(callback: EntanglementCallback, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    records = [without_account(record) for record in callback.records]
    window = to_window(records, tiny_tokenizer)
    assert window.moved == {} and window.accounted_places == []
    assert window.accounted == () and window.explained is None and window.pushes == []
    assert len(window.predicted) == 8
    assert not [name for name in summarize(records) if "moved" in name or "explained" in name]


def test_the_largest_pushes_are_shown_as_text(
    callback: EntanglementCallback, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    records = list(callback.records)
    shown = to_window(records, tiny_tokenizer).pushes
    others = ~torch.eye(8, dtype=torch.bool)
    sizes = torch.cat([record.attribution.pushes[others].abs() for record in records]).sort(descending=True).values
    assert [abs(push.push) for push in shown] == sizes[:5].tolist()
    names = [f"{side} of pair {pair}" for side in ("chosen", "rejected") for pair in range(4)]

    def text(record: StepRecord, row: int) -> str:
        ids, marks = record.batch.row(row)
        return tiny_tokenizer.decode(ids[marks].tolist()).replace("<eos>", "")

    for push in shown:
        record, row, by = records[push.step - 1], names.index(push.moved), names.index(push.by)
        assert push.push == record.attribution.pushes[row, by] and push.change == record.attribution.total[row]
        assert (push.text, push.by_text) == (text(record, row), text(record, by))
    assert to_window(records, None).pushes == []


def test_the_most_entangled_pairs_are_shown_as_text(
    callback: EntanglementCallback, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    records = list(callback.records)
    shown = to_window(records, tiny_tokenizer).entangled
    cosines = sorted((cosine for record in records for cosine in record.gram.cosine.tolist()), reverse=True)
    assert [pair.cosine for pair in shown] == cosines[:5]
    texts = {(row["prompt"], row["chosen"], row["rejected"]) for row in preferences()}
    assert {(pair.prompt, pair.chosen, pair.rejected) for pair in shown} <= texts
    assert to_window(records, None).entangled == []


def test_rows_of_the_stream(callback: EntanglementCallback) -> None:
    record = callback.records[1]
    rows = to_rows(record)
    assert [(row["step"], row["pair"], row["checkpoint"]) for row in rows] == [(2, pair, "train") for pair in range(4)]
    assert [row["inner"] for row in rows] == record.gram.inner.tolist()
    assert [row["d_w"] for row in rows] == record.verdict.d_w.tolist()
    assert [row["chosen_len"] for row in rows] == record.gram.chosen_len.tolist()
    assert {row["ref_chosen_logp"] for row in rows} == {None}
    assert list(rows[0]) == [*PAIR_COLUMNS, *MOVED_COLUMNS]
    for source in MOVED_SOURCES:
        chosen, rejected = record.attribution.moved[source].view(2, 4).tolist()
        assert [row[f"chosen_moved_{source}"] for row in rows] == chosen
        assert [row[f"rejected_moved_{source}"] for row in rows] == rejected
    assert [row["chosen_realised"] for row in rows] == record.chosen_realised.tolist()
    assert [row["rejected_realised"] for row in rows] == record.rejected_realised.tolist()


def test_rows_of_a_step_without_an_account(callback: EntanglementCallback) -> None:
    rows = to_rows(replace(without_account(callback.records[1]), chosen_realised=None, rejected_realised=None))
    assert list(rows[0]) == [*PAIR_COLUMNS, *MOVED_COLUMNS]
    assert {row[name] for row in rows for name in MOVED_COLUMNS} == {None}


def test_the_stream_of_a_run_says_what_moved_its_pairs(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Adam has no account of its first step: null there, and the figures from the second on."""
    callback = EntanglementCallback(every=1, alert=None, out=tmp_path / "out", on_error="raise")
    make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback], optim="adamw_torch", learning_rate=1e-4).train()
    columns = read_stream(tmp_path / "out" / "pairs.jsonl")
    assert columns["step"] == [1] * 4 + [2] * 4
    first, second = callback.records
    assert first.attribution is None
    for source in MOVED_SOURCES:
        want = second.attribution.moved[source].view(2, 4).tolist()
        for side, values in zip(("chosen", "rejected"), want, strict=True):
            assert columns[f"{side}_moved_{source}"] == [None] * 4 + values
    assert columns["chosen_realised"] == [None] * 8


def account(**fields: Any) -> StepAttribution:
    """Of two pairs: chosen, chosen, rejected, rejected; sources that are left out are 0."""
    moved = {source: torch.tensor(fields.get(source, [0.0] * 4), dtype=torch.float64) for source in MOVED_SOURCES}
    realised = fields.get("realised")
    return StepAttribution(
        products=torch.eye(4).double(), pushes=torch.eye(4).double(), moved=moved,
        realised=None if realised is None else torch.tensor(realised, dtype=torch.float64),
    )  # fmt: skip


def test_moves_are_means_over_responses() -> None:
    first = account(own=[1.0, 2.0, -1.0, -4.0], momentum=[0.5, 0.5, 0.25, 0.25], realised=[2.0, 2.0, -1.0, -3.0])
    second = account(own=[3.0, 6.0, -2.0, -5.0], realised=[3.0, 5.0, -2.0, -5.0])
    scalars = summarize_moves([first, second])
    assert {name for name, value in scalars.items() if value == 0} == {
        f"gradent/moved/{side}/{source}" for side in ("chosen", "rejected")
        for source in MOVED_SOURCES if source not in ("own", "momentum")
    }  # fmt: skip
    assert scalars["gradent/moved/chosen/own"] == 3.0 and scalars["gradent/moved/rejected/own"] == -3.0
    assert scalars["gradent/moved/chosen/momentum"] == 0.25 and scalars["gradent/moved/rejected/momentum"] == 0.125
    # first: rest (0.5, -0.5, -0.25, 0.75), realised² 18; second: rest (0, -1, 0, 0), realised² 63.
    assert first.total.tolist() == [1.5, 2.5, -0.75, -3.75] and first.rest.tolist() == [0.5, -0.5, -0.25, 0.75]
    assert first.explained == pytest.approx(1 - 1.125 / 18) and second.explained == pytest.approx(1 - 1 / 63)
    assert scalars["gradent/explained"] == share_explained([first, second]) == pytest.approx(1 - 2.125 / 81)


def test_moves_of_nothing() -> None:
    assert summarize_moves([]) == {} and share_explained([]) is None
    bare = account(own=[1.0, 2.0, 3.0, 4.0])
    assert "gradent/explained" not in summarize_moves([bare]) and share_explained([bare]) is None
    still = account(own=[1.0, 2.0, 3.0, 4.0], realised=[0.0] * 4)
    assert share_explained([still]) is None and math.isnan(still.explained)
    assert share_explained([bare, account(own=[1.0] * 4, realised=[2.0] * 4)]) == pytest.approx(0.75)
    empty = account(**{source: [] for source in MOVED_SOURCES}, realised=[])
    assert summarize_moves([empty]) == {}
    assert summarize_moves([empty, bare])["gradent/moved/chosen/own"] == 1.5


def test_a_step_that_is_not_split_has_one_source(callback: EntanglementCallback) -> None:
    total = torch.tensor([-1.0, -2.0, -3.0, -2.0, -3.0, -4.0, -5.0, -4.0], dtype=torch.float64)
    nothing = torch.full((8, 8), float("nan"), dtype=torch.float64)
    whole = StepAttribution(products=nothing, pushes=nothing, moved={UNSPLIT: total}, realised=total + 1.0)
    assert torch.equal(whole.total, total) and whole.explained == pytest.approx(
        1 - 8 / float((total + 1).square().sum())
    )
    assert set(summarize_moves([whole])) == {
        "gradent/moved/chosen/step", "gradent/moved/rejected/step", "gradent/explained"
    }  # fmt: skip
    joined = StepAttribution.join([whole.select([0, 2]), whole.select([1])])
    assert joined.total.tolist() == [-1.0, -3.0, -2.0, -3.0, -5.0, -4.0]
    record = replace(callback.records[0], step=5, attribution=whole)
    window = to_window([record, replace(record, step=6, attribution=None)], None)
    assert window.moved["chosen"][UNSPLIT][0] == -2.0 and math.isnan(window.moved["chosen"][UNSPLIT][1])
    assert window.moved_mean("rejected", [0]) == {UNSPLIT: -4.0} and window.pushes == []
    said = describe(replace(window, explained=None), Alert(pairs=1))
    assert said is not None and said.startswith("step 5: chosen -2 ± 0.4 nats; rejected -4 ± 0.4 nats")
    row = to_rows(record)[0]
    assert (row["chosen_moved_step"], row["rejected_moved_step"]) == (-1.0, -3.0) and row["chosen_moved_own"] is None


def said_in(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [line.getMessage() for line in caplog.records if line.name == name]


def test_the_verdict_in_the_training_log(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows of four pairs are joined: nothing is said before there are 8, and then of all 8."""
    anything = Alert(both_down=1e-9, both_up=1e-9, reversed=1e-9, again=1, pairs=8)
    callback = EntanglementCallback(every=1, alert=anything, out=tmp_path / "records")
    # A loss that pushes chosen down: whatever the gradients are, chosen does not rise.
    trainer = make_trainer(
        "dpo", llama(), tiny_tokenizer, tmp_path, [callback], data=data_for("dpo"), max_steps=7, loss_type=["apo_down"]
    )
    with caplog.at_level(logging.WARNING, "gradent"):
        trainer.train()
    first, second, third = said_in(caplog, "gradent")
    assert first.startswith("[gradent] steps 1-2: ") and "of 8 pairs in case" in first
    assert second.startswith("[gradent] steps 3-4: ") and "of 8 pairs in case" in second
    assert third.startswith("[gradent] steps 5-6: chosen "), "an account is told of from step 5 on"
    assert "a step" in third and "of 8 pairs in case" in third
    (closing,) = said_in(caplog, "gradent.run")
    cases = torch.cat([record.verdict.case for record in callback.records])
    names = {1: "ideal", 2: "both down", 3: "both up", 4: "reversed"}
    counts = {name: int((cases == number).sum()) for number, name in names.items()}
    told = {name: count for name, count in counts.items() if count or name in ("ideal", "both down")}
    shares = [f"{int(100 * count / 28 + 0.5)}% {name}" for name, count in told.items()]
    records = tmp_path / "records" / "pairs.jsonl"
    assert closing == f"gradent: 7 measured steps, 28 pairs: {', '.join(shares)}; records in {records}"


def test_nothing_is_said_of_few_pairs_but_the_closing_line_is(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for alert in (Alert(both_down=1e-9, both_up=1e-9, reversed=1e-9), None):
        caplog.clear()
        callback = EntanglementCallback(every=1, alert=alert)
        with caplog.at_level(logging.WARNING, "gradent"):
            make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback], max_steps=7).train()
        assert said_in(caplog, "gradent") == [], "28 pairs are below 32"
        (closing,) = said_in(caplog, "gradent.run")
        assert closing.startswith("gradent: 7 measured steps, 28 pairs: ") and "records" not in closing


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_line_stands_by_itself_beside_a_progress_bar(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    logging.getLogger("gradent").addHandler(handler)
    try:
        with tqdm(total=60, ncols=60) as bar:
            bar.update(5)
            log("step 200: 75% of 64 pairs")
    finally:
        logging.getLogger("gradent").removeHandler(handler)
    line = next(line for line in stream.getvalue().split("\n") if "step 200" in line)
    # What a terminal shows of a line is what stands behind its last carriage return.
    assert line.rpartition("\r")[2] == "[gradent] step 200: 75% of 64 pairs"
    assert is_terminal or "\r" not in line


def test_large_matrices_are_let_go_of(callback: EntanglementCallback, monkeypatch: pytest.MonkeyPatch) -> None:
    record = callback.records[-1]
    assert record.attribution is not None and record.attribution.products.shape == (8, 8)
    assert record.without_large_matrices() is record
    monkeypatch.setattr("gradent.trainer.records.step.LARGE", 7)
    small = record.without_large_matrices()
    assert small.attribution is not None and small.attribution.products.shape == (0, 0)
    assert torch.equal(small.attribution.total, record.attribution.total)
