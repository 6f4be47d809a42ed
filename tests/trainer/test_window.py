"""From measured steps to the plain window that words and panels are made from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback
from gradent.report.live.alerts import Alert
from gradent.trainer.callback.step import summarize, to_rows
from gradent.trainer.callback.window import to_window
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
    down = [(record.verdict.case == 2) | (record.verdict.case == 4) for record in records]
    assert len(window.chosen_needs) == len(window.weight_ratio) == sum(int(which.sum()) for which in down)


def test_the_most_entangled_pairs_are_shown_as_text(
    callback: EntanglementCallback, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    records = list(callback.records)
    shown = to_window(records, tiny_tokenizer).entangled
    cosines = sorted((cosine for record in records for cosine in record.gram.cosine.tolist()), reverse=True)
    assert [pair.cosine for pair in shown] == cosines[:5]
    texts = {(f"<bos>{row['prompt']}", f"{row['chosen']}<eos>", f"{row['rejected']}<eos>") for row in preferences()}
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


def test_the_verdict_in_the_training_log(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    anything = Alert(both_down=1e-9, both_up=1e-9, reversed=1e-9, again=2)
    callback = EntanglementCallback(every=1, alert=anything)
    # A loss that pushes chosen down: whatever the gradients are, chosen does not rise.
    trainer = make_trainer(
        "dpo", llama(), tiny_tokenizer, tmp_path, [callback], data=data_for("dpo"), max_steps=3, loss_type=["apo_down"]
    )
    with caplog.at_level(logging.WARNING, "gradent"):
        trainer.train()
    said = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert said and said[0].startswith("step 1: ") and "of 4 pairs in case" in said[0]
    assert len(said) <= 3
