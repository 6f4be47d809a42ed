"""Token-masked DPO: the loss and its gradients are the formula's, and the trainer is TRL's in all the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from gradent.losses.token_masked import token_masked_loss
from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
from gradent.trainer.token_masking.head import MaskHead
from gradent.trainer.token_masking.trainer import TokenMaskedDPOTrainer
from tests.covering import cross
from tests.trainer.runs import data_for, llama, weights_of, with_lora

SETTINGS = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant",
    "optim": "sgd", "max_grad_norm": 1.0, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
    "activation_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "seed": 7,
}  # fmt: skip


def make(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path, *, plain: bool = False, ref: Any = None,
    data: Any = None, options: dict[str, Any] | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    """The trainer under test, or TRL's own with the same settings; all parameters of a model get a reference."""
    trainer, config = (DPOTrainer, DPOConfig) if plain else (TokenMaskedDPOTrainer, TokenMaskedDPOConfig)
    given = {key: value for key, value in arguments.items() if not (plain and key.startswith("mask_"))}
    if ref is None and not hasattr(model, "peft_config"):
        ref = llama(seed=3)
    return trainer(
        model=model,
        ref_model=ref,
        args=config(**{"output_dir": str(out), **SETTINGS, **given}),
        train_dataset=data_for("dpo") if data is None else data,
        processing_class=tokenizer,
        **(options or {}),
    )


def stirred(head: MaskHead, spread: float = 3.0) -> MaskHead:
    """The head with weights under which tokens differ, some kept and some not."""
    with torch.no_grad():
        head.outer.weight.normal_(0, spread, generator=torch.Generator().manual_seed(1))
        head.outer.bias.zero_()
    return head


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# The trainer's loss and gradients against the formula, row by row.


def by_hand(trainer: Any, batch: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """The formula's mean loss of a batch, from one plain forward of an unpadded row each, and all its scores."""
    rows = []
    for row in range(len(batch["input_ids"])):
        keep = batch["attention_mask"][row].bool()
        ids, marks = batch["input_ids"][row][keep], batch["completion_mask"][row][keep][1:].bool()
        found = trainer.model(input_ids=ids[None], output_hidden_states=True)
        scores = trainer.mask_head(found.hidden_states[-1][0, :-1].detach())[marks].double()
        with torch.no_grad():
            other = trainer.ref_model(input_ids=ids[None]).logits
        both = [
            logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[marks, 0] for logits in (found.logits, other)
        ]  # fmt: skip
        rows.append((*both, scores, torch.ones(len(scores), dtype=torch.bool)))
    columns = [nn.utils.rnn.pad_sequence(list(column), batch_first=True) for column in zip(*rows, strict=True)]
    return token_masked_loss(*columns, **settings).mean(), torch.cat([row[2] for row in rows])


@pytest.mark.parametrize("hidden", [0, 8], ids=["linear", "one layer"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "checkpointing"])
def test_trainer_against_the_formula(
    hidden: int, recomputed: bool, tiny_gpt2: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    reference = copy.deepcopy(tiny_gpt2)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
    trainer = make(
        tiny_gpt2, tiny_tokenizer, tmp_path, ref=reference, mask_hidden=hidden, mask_eta=0.3, mask_threshold=0.2,
        mask_k_start=2.0, activation_checkpointing=recomputed,
    )  # fmt: skip
    stirred(trainer.mask_head)
    batch = next(iter(trainer.get_train_dataloader()))
    parameters = [*trainer.model.parameters(), *trainer.mask_head.parameters()]
    settings = {"beta": 0.1, "eta": 0.3, "threshold": 0.2}
    want, scores = by_hand(trainer, batch, k=2.0, **settings)
    grads = torch.autograd.grad(want, parameters)
    trainer.model.train()
    if recomputed:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    got = trainer.compute_loss(trainer.model, batch)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)  # the head is in float32
    for mine, right in zip(torch.autograd.grad(got, parameters), grads, strict=True):
        assert error(mine.double(), right.double()) <= 5e-6
    trainer.model.eval()
    with torch.no_grad():
        hard = trainer.compute_loss(trainer.model, batch)
        assert hard.item() == pytest.approx(by_hand(trainer, batch, hard=True, **settings)[0].item(), rel=1e-6)
    assert 0 < int((scores >= 0.2).sum()) < len(scores)


def test_the_policy_learns_through_scores_only_where_asked(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = {}
    for detach in (True, False):
        trainer = make(llama(), tiny_tokenizer, tmp_path, mask_detach=detach, mask_eta=0.0)
        stirred(trainer.mask_head)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        found[detach] = loss, torch.autograd.grad(loss, trainer.model.model.norm.weight)[0]
    assert found[True][0] == found[False][0] and error(found[True][1], found[False][1]) > 1e-2


# With masks of 1 it is DPO, to the bit.

WAYS: dict[str, dict[str, Any]] = {
    "as it is": {}, "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True}, "bf16": {"bf16": True}, "adam": {"optim": "adamw_torch"},
    "hinge": {"loss_type": ["hinge"]}, "mixed": {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    "forward_kl": {"f_divergence_type": "forward_kl"}, "dropout": {"disable_dropout": False},
}  # fmt: skip


@cross("frozen, way, lora", [True, False], WAYS, [False, True], ids=[["frozen", "saturated"], None, ["full", "LoRA"]])
def test_dpo_to_the_bit(
    way: str, lora: bool, frozen: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def run(plain: bool) -> Any:
        model = with_lora(llama(attention_dropout=0.1), dropout=0.1) if lora else llama(attention_dropout=0.1)
        masks = {"mask_freeze": frozen, "mask_eta": 0.0}
        trainer = make(model, tiny_tokenizer, tmp_path, plain=plain, **masks, **WAYS[way])
        if not (plain or frozen):
            with torch.no_grad():
                trainer.mask_head.outer.bias.fill_(1e6)  # σ is exactly 1
        trainer.train()
        return trainer

    ours, trls = run(False), run(True)
    weights = weights_of(trls.model)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(ours.model).items())
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    for mine, right in zip(ours.state.log_history, trls.state.log_history, strict=True):
        assert {name: mine[name] for name in right if name not in timed} == {
            name: value for name, value in right.items() if name not in timed
        }
    assert logged(ours, "mask/kept_chosen") == [1.0] * 3 and logged(ours, "mask/mean_rejected") == [1.0] * 3
