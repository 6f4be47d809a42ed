"""Tiny trainings with real trainers: data, models, and what a run left behind."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from gradent.pairs.batch import PairBatch
from tests.truth import call

WORDS = ("seven", "a red door", "rain", "no", "the long way", "it is late", "yes, of course", "blue")

TRAINERS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "tpo": (TPOTrainer, TPOConfig),
    "reward": (RewardTrainer, RewardConfig),
}


def preferences(count: int = 8) -> list[dict[str, str]]:
    """Ragged rows of text, all different."""
    rows = []
    for number in range(count):
        chosen, rejected = WORDS[number % 8], WORDS[(3 * number + 1) % 8]
        rows.append(
            {"prompt": f"Q{number}: {WORDS[(number + 5) % 8]}?", "chosen": f" {chosen}", "rejected": f" {rejected}."}
        )
    return rows


def data_for(name: str, count: int = 8) -> Dataset:
    """The rows as that trainer takes them."""
    rows: list[dict[str, Any]] = list(preferences(count))
    if name == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for number, row in enumerate(rows)
            for side in (("chosen", "rejected") if number % 2 else ("rejected", "chosen"))
        ]
    if name == "tpo":
        rows = [{**row, "reference": f" well, {row['chosen']}"} for row in rows]
    return Dataset.from_list(rows)


def llama(seed: int = 0, *, kind: type = LlamaForCausalLM, **fields: Any) -> Any:
    """A Llama in float32 for `tiny_tokenizer`'s ids, with weights large enough that its log-probs differ."""
    config = LlamaConfig(
        **{
            "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, **fields,
        }
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config)


def with_lora(model: nn.Module, seed: int = 1, dropout: float = 0.0) -> PeftModel:
    """The model under a LoRA adapter, no factor of which is zero."""
    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type=task, lora_dropout=dropout,
        init_lora_weights=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def make_trainer(
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    data: Any = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """A trainer of two steps of four pairs, plain SGD without clipping, silent; `arguments` are its config's."""
    trainer, config = TRAINERS[name]
    options = dict(options or {})
    if name in ("dpo", "kto") and not hasattr(model, "peft_config"):
        options.setdefault("ref_model", llama(seed=3))
    settings = {
        "output_dir": str(out), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "seed": 7, **arguments,
    }  # fmt: skip
    return trainer(
        model=model,
        args=config(**settings),
        train_dataset=data_for(name) if data is None else data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **options,
    )


class Gradients(TrainerCallback):
    """Keeps a copy of the model before training, and of the gradient of every optimizer step."""

    def __init__(self, model: nn.Module) -> None:
        self.models = [copy.deepcopy(model)]
        self.grads: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.grads.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = {name: parameter.detach() for name, parameter in kwargs["model"].named_parameters()}
        after = copy.deepcopy(self.models[0])
        with torch.no_grad():
            for name, parameter in after.named_parameters():
                parameter.copy_(weights[name])
        self.models.append(after)


def summed(model: nn.Module, batch: PairBatch, weights: Tensor) -> dict[str, Tensor]:
    """`Σ weights_i ∇log π(y_i|x_i)` over the 2B rows, one plain backward of unpadded rows."""
    total = torch.zeros((), dtype=torch.float32)
    model.eval()
    for row, weight in enumerate(weights.tolist()):
        ids, marks = batch.row(row)
        logps = call(model, ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total = total + weight * logps[marks[1:].bool()].sum()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def gradient_error(record: Any, model: nn.Module, grads: dict[str, Tensor], pairs: Tensor | float) -> float:
    """How far `Σ (d_l g_l - d_w g_w) / pairs` is from the trainer's own gradient, relative to its size."""
    weights = torch.cat([-record.verdict.d_w / pairs, record.verdict.d_l / pairs])
    want = summed(model, record.batch, weights)
    names = [name for name in grads if bool(grads[name].any()) or name in want]
    got, expected = (torch.cat([side[name].double().flatten() for name in names]) for side in (grads, want))
    return float((got - expected).norm() / got.norm())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
