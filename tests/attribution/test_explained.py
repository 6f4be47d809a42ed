"""How much of what really moved an account explains, in real DPO runs with AdamW, clipping and a schedule."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.account import judge, train
from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.task import make_task, text_rows

WARM, STEPS = 20, 6
SHARED = Path(os.environ.get("GRADENT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
"""Small pretrained models and real preference data, where there are any."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The demo's model as a folder, and rows of its task."""
    folder, tokenizer = tmp_path_factory.mktemp("demo"), build_tokenizer()
    build_model(len(tokenizer), 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    task = make_task(seed=0, train=4 * (WARM + STEPS), probe=2, answers=1)
    return folder, text_rows(task.train, "long suffix", task.label_words)


def pretrained(name: str) -> tuple[Path, list[dict[str, Any]]]:
    folder, data = SHARED / "models" / name, SHARED / "data" / "qa_feedback_dev.jsonl"
    if not (folder.exists() and data.exists()):
        pytest.skip(f"no {name} and its data in {SHARED.name} (GRADENT_SHARED)")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    return folder, [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]


def explained(folder: Path, rows: list[dict[str, Any]], out: Path, *, lora: bool, lr: float, mode: str) -> None:
    callback = train(folder, rows, lora=lora, lr=lr, steps=WARM + STEPS, out=str(out), mode=mode)
    found = judge(callback, WARM)
    assert found["account"] >= (0.98 if mode == "auto" else 0.999)
    assert found["account_sign"] >= 0.95
    assert found["pair_alone"] < found["account"] - 0.1, "one pair under plain gradient descent is another question"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "lr", "mode"),
    [
        pytest.param(False, 1e-5, "auto", id="full-auto"),
        pytest.param(True, 1e-4, "measure", id="LoRA-measure"),
        pytest.param(False, 1e-5, "measure", id="full-measure", marks=pytest.mark.nightly),
        pytest.param(True, 1e-4, "auto", id="LoRA-auto", marks=pytest.mark.nightly),
    ],
)
def test_the_demos_model(
    lora: bool, lr: float, mode: str, demo: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    explained(*demo, tmp_path, lora=lora, lr=lr, mode=mode)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lora", "lr", "mode"),
    [
        ("stories260K", False, 1e-5, "auto"),
        ("stories260K", False, 1e-5, "measure"),
        ("stories260K", True, 5e-5, "auto"),
        ("stories260K", True, 5e-5, "measure"),
        ("stories15M", True, 5e-5, "auto"),
    ],
)
def test_a_pretrained_model(name: str, lora: bool, lr: float, mode: str, tmp_path: Path) -> None:
    explained(*pretrained(name), tmp_path, lora=lora, lr=lr, mode=mode)
