"""The demo at its own settings, and the paper's claims about tokens on its model: Section 4.3's signs, Theorem 3's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

from gradent.cli.app import app
from gradent.demo import train
from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.settings import EMBEDDED
from gradent.demo.task import STYLES
from gradent.pairs.batch import PairBatch
from scripts.token_claims import prepare, read_claims
from tests.shared import value_once

Fitted = tuple[PreTrainedModel, PreTrainedTokenizerBase, PairBatch]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    """The demo's model after its SFT, a minute's work."""
    return value_once("the demo's model after its SFT", prepare)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the SFT, which is asked for and left out."""
    asked = []

    def train_sft(model: Any, tokenizer: Any, task: Any, settings: Any, *, seed: int, advance: Any) -> None:
        fresh = build_model(len(tokenizer), 0).state_dict()
        assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
        asked.append((settings.sft_steps, settings.train, len(task.train), len(tokenizer), seed))

    monkeypatch.setattr(train, "train_sft", train_sft)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["demo", "--steps", "2", "--out", "demo"])
    assert done.exit_code == 0, done.output
    assert asked == [(EMBEDDED.sft_steps, EMBEDDED.train, EMBEDDED.train, len(build_tokenizer()), 0)]
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"report.html", "pairs.parquet", "demo.json"}
    for style in STYLES:
        assert style in done.stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_the_papers_claims_about_tokens_hold(fitted: Fitted) -> None:
    model, _, batch = fitted
    claims, grams = read_claims(model, batch)
    before, at, after = claims["before"], claims["at"], claims["after"]
    # Figure 4b: the differing tokens' entry is negative, identical tokens' entries are positive.
    assert (at.entry < 0).all()
    assert (after.entry > 0).all()
    assert (before.entry > 1 - 1e-5).all()  # up to where they differ the two are one
    # Theorem 3: a step leaves what is before (nearly) alone, raises the chosen label, lowers the suffix of both.
    assert before.chosen.abs().mean() < at.chosen.mean() / 10
    assert (at.chosen > 0).all() and (at.rejected < 0).all()
    assert (after.chosen < 0).all() and (after.rejected < 0).all()
    # Identical tokens entangle.
    splits = [gram.split() for gram in grams]
    assert sum(split.identical for split in splits) > sum(split.differing for split in splits)
