"""`examples/grpo.py`: its run learns, and its lines say what the account of a step says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gradent import EntanglementCallback
from gradent.trainer.records.step import share_explained
from tests.attribution.test_explained import SHARED
from tests.pages import ROOT


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """As `python examples/grpo.py` has it."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path.remove(str(ROOT / "examples"))


@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    from grpo import make_start, make_trainer  # noqa: PLC0415

    torch.manual_seed(0)
    trainer = make_trainer(make_start(), str(tmp_path), steps=30)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 6
    assert rewards[-1] > rewards[0] + 0.3


@pytest.mark.slow
def test_the_account_explains_what_really_moved(tmp_path: Path) -> None:
    from grpo import make_start, make_trainer  # noqa: PLC0415

    folder = SHARED / "models" / "stories260K"
    if not folder.exists():
        pytest.skip(f"no stories260K in {SHARED.name} (GRADENT_SHARED)")
    torch.manual_seed(0)
    callback = EntanglementCallback(every=1, realised=True, on_error="raise")
    make_trainer(make_start(str(folder)), str(tmp_path), steps=28, callbacks=[callback]).train()
    accounts = [record.attribution for record in callback.records if record.step > 20 and len(record.rows)]
    assert len(accounts) >= 6 and all(account.is_whole for account in accounts)
    assert share_explained(accounts) >= 0.98


def test_the_reward_is_a_rule() -> None:
    from grpo import has_word  # noqa: PLC0415

    assert has_word("good")(prompts=["a", "b"], completions=["truly GOOD .", "quite bad ."]) == [1.0, 0.0]


def test_a_model_of_the_user_s_is_taken(tmp_path: Path) -> None:
    from grpo import STORIES, make_start, make_tokenizer  # noqa: PLC0415
    from tiny import make_model  # noqa: PLC0415

    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    start = make_start(str(tmp_path), "joy")
    assert (start.prompts, start.word) == (STORIES, "joy")
    assert torch.equal(start.model.lm_head.weight, model.lm_head.weight)


def test_the_lines_are_of_the_positives() -> None:
    from grpo import describe  # noqa: PLC0415

    rows = SimpleNamespace(
        group=torch.tensor([0, 0, 0, 1, 1]),
        weight=torch.tensor([1.0, -0.5, 0.5, 0.0, 0.0]),
        moved={
            "own": torch.tensor([1.0, 9.0, 0.25, 0.0, 0.0]),
            "negatives": torch.tensor([-0.5, 9.0, -0.75, 0.0, 0.0]),
        },
    )
    line = "step 3, group 0: 2 of 3 positive, 1 lowered: own +0.62, negatives -0.62 (nats)"
    assert describe(SimpleNamespace(step=3, rows=rows)) == [line]
