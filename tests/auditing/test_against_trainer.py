"""The guard: a run that is measured as it was trained raises no doubt, and one that is not does, with the causes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from peft import PeftModel

from gradent.auditing.against_trainer import _expected
from tests.auditing.situations import LORA, adapted, audited, base_of, train, trained_adapter
from tests.auditing.trained import word_pairs

RIGHT = {
    "LoRA": {"peft": LORA},
    "LoRA with dropout": {"peft": {**LORA, "lora_dropout": 0.3}},
    "full": {"learning_rate": 1e-3},
    "bfloat16": {"peft": LORA, "bf16": True},
    "max_length": {"peft": LORA, "max_length": 6},
    "uneven batches": {"peft": LORA, "per_device_train_batch_size": 3},
    "beta": {"peft": LORA, "beta": 0.5},
}
ORDINARY = [(name, seed) for name in RIGHT for seed in range(3)]


@pytest.mark.parametrize(
    ("kind", "seed"), [pytest.param(*each, marks=[] if each[1] == 0 else pytest.mark.nightly) for each in ORDINARY]
)
def test_an_ordinary_run_raises_no_doubt(kind, seed, tmp_path) -> None:
    train(base_of(tmp_path), tmp_path, seed=seed, **RIGHT[kind])
    options = {name: RIGHT[kind][name] for name in ("beta", "max_length") if name in RIGHT[kind]}
    base = {} if "peft" in RIGHT[kind] else {"base": str(tmp_path / "base")}
    if "beta" in options:
        from gradent import losses  # noqa: PLC0415

        options["loss"] = losses.get("dpo", beta=options.pop("beta"))
    assert audited(tmp_path, **options, **base).summary["doubt"] is None


def test_a_merge_that_was_never_saved(tmp_path) -> None:
    trained_adapter(base_of(tmp_path), tmp_path / "sft")
    merged = adapted(base_of(tmp_path), tmp_path / "sft").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    train(merged, tmp_path, peft=LORA)
    summary = audited(tmp_path, report=True).summary
    assert "1. a merge that the adapter was trained on and that was never saved (--base DIR" in summary["doubt"]
    assert summary["notes"][0] == summary["doubt"]
    assert "Another function was trained" in (tmp_path / "out/report.html").read_text("utf-8")
    right = audited(tmp_path, base=str(tmp_path / "merged"), out=tmp_path / "right")
    assert right.summary["doubt"] is None


def test_a_frozen_reference_that_is_lost(tmp_path) -> None:
    trained_adapter(base_of(tmp_path), tmp_path / "sft")
    model = PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "sft", is_trainable=True)
    run = train(model, tmp_path)
    assert audited(tmp_path).summary["doubt"] is None
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoint-{step}/ref")
    doubt = audited(tmp_path, out=tmp_path / "lost").summary["doubt"]
    log = json.loads((run / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    implied = sum(entry["logps/chosen"] - entry["rewards/chosen"] / 0.1 for entry in log) / 4
    assert f"are {implied:,.1f} on chosen" in doubt


LONG = {
    "LoRA": {"peft": LORA},
    "LoRA, every third step logged": {"peft": LORA, "logging_steps": 3},
    "dropout": {"peft": {**LORA, "lora_dropout": 0.3}},
    "fast": {"peft": LORA, "learning_rate": 5e-2},
    "full": {"learning_rate": 2e-3},
    "bfloat16": {"peft": LORA, "bf16": True},
    "keep_end": {"peft": LORA, "max_length": 6, "truncation_mode": "keep_end"},
    "one pair a batch": {"peft": LORA, "per_device_train_batch_size": 1},
}


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        pytest.param(kind, seed, marks=[] if (seed, kind) == (0, "fast") else pytest.mark.nightly)
        for kind in LONG
        for seed in range(3)
    ],
)
def test_a_longer_run_raises_no_doubt(kind, seed, tmp_path) -> None:
    length = {"max_steps": 24, "save_steps": 8, "seed": seed}
    train(base_of(tmp_path), tmp_path, rows=word_pairs(40), **{**length, **LONG[kind]})
    base = {} if "peft" in LONG[kind] else {"base": str(tmp_path / "base")}
    assert audited(tmp_path, **base).summary["doubt"] is None


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_the_wrong_end_of_long_rows(loss, tmp_path) -> None:
    length = {"max_steps": 16, "save_steps": 8, "learning_rate": 1e-3}
    train(base_of(tmp_path), tmp_path, peft=LORA, max_length=6, truncation_mode="keep_end", **length)
    assert audited(tmp_path, loss=loss).summary["doubt"] is None
    doubt = audited(tmp_path, loss=loss, truncation_mode="keep_start", out=tmp_path / "wrong").summary["doubt"]
    assert "1. another truncation: the run's training_args.bin says truncation_mode='keep_end'" in doubt


def test_what_a_log_leads_one_to_expect() -> None:
    draw = np.random.default_rng(0)
    line = [(step, -40 - 0.5 * (step - 1) + draw.normal()) for step in range(1, 25)]  # each before its step
    value, error = _expected(line, 16, 4.0, 16)
    assert abs(value - (-40 - 0.5 * 16)) < error < 4.5
    off = [(step, -40 - 0.5 * (step - 1)) for step in range(1, 25)]
    assert _expected(off, 16, 0.0, 16) == (pytest.approx(-48), pytest.approx(0, abs=1e-6))
    third = [(step, -40 - 0.5 * (step - 2)) for step in range(3, 25, 3)]  # means over three steps
    assert _expected(third, 12, 0.0, 16)[0] == pytest.approx(-46)
    assert _expected(line[:3], 3, 4.0, 16) is None
