"""What pairwise normalization refuses, each with what was received, what is accepted and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl.trainer.utils
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig

from gradent import GradentError
from gradent.errors import InputError, ModelError
from gradent.trainer.pairwise.config import PairwiseNormalizedDPOConfig
from gradent.trainer.pairwise.trainer import PairwiseNormalizedDPOTrainer
from tests.trainer.runs import llama
from tests.trainer.test_pairwise import SETTINGS, batch_gradient, make

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scale": ({"scale": "big"}, "scale='big' is unknown; accepted are 'loss'"),
    "C": ({"C": 0.0}, "C=0.0; accepted is a finite number > 0"),
    "budget": ({"memory_budget": "much"}, "memory_budget"),
    "loss": ({"preference_loss": "sigmoid"}, "preference_loss='sigmoid': unknown loss; accepted are dpo, rdpo"),
    "hyperparameter": ({"preference_loss": "simpo", "preference_loss_kwargs": {"lam": 1}}, "no hyperparameter 'lam'"),
    "kwargs alone": ({"preference_loss_kwargs": {"beta": 1}}, "name the loss that they belong to"),
    "ld_alpha": ({"ld_alpha": 0.5}, "ld_alpha=0.5: pairwise normalization cannot be exact"),
    "ld_alpha at zero": ({"ld_alpha": 0.0}, "ld_alpha=0.0: pairwise normalization cannot be exact"),
    "C, a switch": ({"C": True}, "C=True; accepted is a finite number > 0"),
    "a design": ({"preference_loss": "token_masked"}, "preference_loss='token_masked': unknown loss"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel=True"),
    "offloading": ({"activation_offloading": True}, "activation_offloading=True"),
    "compile": ({"torch_compile": True}, "torch_compile=True"),
    "reentrant": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        "Use {'use_reentrant': False}",
    ),
    "apo_down": ({"loss_type": ["apo_down"]}, "it lowers the log-prob of chosen on purpose"),
    "sft": ({"loss_type": ["sft"]}, "no part on rejected"),
    "weighting": ({"preference_loss": "cpo", "use_weighting": True}, "use_weighting=True belongs to TRL's own loss"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(GradentError) as caught:
        PairwiseNormalizedDPOConfig(**{"output_dir": str(tmp_path), **SETTINGS, **arguments})
    assert message in str(caught.value)


def test_refused_later(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="args is a DPOConfig; accepted is a PairwiseNormalizedDPOConfig"):
        PairwiseNormalizedDPOTrainer(llama(), None, DPOConfig(output_dir=str(tmp_path), **SETTINGS))
    trainer = make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3))
    trainer.model.activation_checkpointing_enable({"use_reentrant": True})
    trainer.model.enable_input_require_grads()
    with pytest.raises(InputError, match="use_reentrant"):
        batch_gradient(trainer)
    trainer = make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3))
    trainer.ld_alpha = 0.5
    with pytest.raises(ModelError, match="weighs the tokens of a response differently"):
        batch_gradient(trainer)


def test_an_old_trl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(trl.trainer.utils, "add_fused_lm_head")
    with pytest.raises(InputError, match=rf"TRL {trl.__version__} is installed.*needs TRL 1.15 or newer"):
        PairwiseNormalizedDPOConfig(output_dir=str(tmp_path))
    with pytest.raises(InputError, match="the fused head"):
        PairwiseNormalizedDPOTrainer(llama())
