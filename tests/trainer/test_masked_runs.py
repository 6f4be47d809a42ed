"""Runs of token-masked DPO: k and η, optimizer, accumulation, resuming, what is saved, ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gradent import EntanglementCallback
from gradent.errors import InputError
from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
from gradent.trainer.token_masking.head import HEAD_FILE, MaskHead, load_head, save_head
from tests.trainer import rank_masked
from tests.trainer.runs import data_for, llama, weights_of, with_lora
from tests.trainer.test_masked import error, logged, make, stirred
from tests.trainer.test_ranks import two_and_one


def test_k_goes_its_way(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def ks(steps: int, **arguments: Any) -> list[float]:
        config = TokenMaskedDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **arguments)
        return [config.k_at(step, steps) for step in range(steps + 2)]

    ends = {"mask_k_start": 1.0, "mask_k_end": 9.0}
    assert ks(5, **ends) == [1.0, 3.0, 5.0, 7.0, 9.0, 9.0, 9.0]
    assert ks(3, mask_anneal="exponential", **ends) == pytest.approx([1.0, 3.0, 9.0, 9.0, 9.0])
    assert ks(2, mask_anneal="none", **ends) == [1.0] * 4
    assert ks(0, **ends) == [1.0, 1.0] and ks(1, **ends) == [1.0, 9.0, 9.0]
    trainer = make(llama(), tiny_tokenizer, tmp_path, max_steps=5, **ends)
    trainer.train()
    assert logged(trainer, "mask/k") == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert logged(trainer, "mask/mean_chosen")[0] == pytest.approx(0.9, rel=1e-6)
    assert logged(trainer, "mask/score")[0] == pytest.approx(math.log(9), rel=1e-6)
    assert logged(trainer, "mask/entropy")[0] == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), rel=1e-5)
    assert logged(trainer, "mask/sparsity_loss")[0] == pytest.approx(0.01 * 0.9, rel=1e-5)


@pytest.mark.parametrize("hidden", [0, 8], ids=["linear", "one layer"])
def test_eta_pushes_the_share_kept_down(hidden: int, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def kept(eta: float) -> tuple[float, float]:
        trainer = make(
            llama(), tiny_tokenizer, tmp_path, mask_eta=eta, max_steps=30, optim="adamw_torch", learning_rate=1e-3,
            mask_learning_rate=0.2, mask_hidden=hidden,
        )  # fmt: skip
        trainer.train()
        return logged(trainer, "mask/kept_chosen")[-1], logged(trainer, "mask/kept_rejected")[-1]

    none, some, much = kept(0.0), kept(0.3), kept(3.0)
    assert min(none) > 0.5
    assert sum(some) < sum(none)
    assert max(much) < 0.1


def test_log_probs_are_logged_of_all_tokens_and_rewards_of_those_kept(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    runs = [make(llama(), tiny_tokenizer, tmp_path, plain=plain, max_steps=1) for plain in (False, True)]
    with torch.no_grad():
        runs[0].mask_head.outer.bias.fill_(-1e6)
    for trainer in runs:
        trainer.train()
    for name in ("logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy"):
        assert logged(runs[0], name) == logged(runs[1], name)
    assert logged(runs[0], "rewards/chosen") == [0.0] and logged(runs[1], "rewards/chosen") != [0.0]
    assert logged(runs[0], "loss") == [pytest.approx(math.log(2))]


def test_the_optimizer_has_the_head(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = make(llama(), tiny_tokenizer, tmp_path, mask_learning_rate=0.5, weight_decay=0.1, max_steps=1)
    before = weights_of(trainer.mask_head)
    trainer.train()
    group = trainer.optimizer.param_groups[-1]
    assert [id(p) for p in group["params"]] == [id(p) for p in trainer.mask_head.parameters()]
    assert (group["lr"], group["weight_decay"], len(trainer.optimizer.param_groups)) == (0.5, 0.0, 3)
    assert all(not torch.equal(value, before[name]) for name, value in weights_of(trainer.mask_head).items())
    assert all(parameter.grad is None for parameter in trainer.mask_head.parameters())
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 3
    own = torch.optim.SGD(llama().parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"Pass \(optimizer, None\)"):
        make(llama(), tiny_tokenizer, tmp_path, options={"optimizers": (own, torch.optim.lr_scheduler.ConstantLR(own))})
    model = llama()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make(model, tiny_tokenizer, tmp_path, options={"optimizers": (own, None)}, mask_learning_rate=None)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.1, 0.05]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_accumulation_is_one_larger_batch(lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def run(**arguments: Any) -> Tensor:
        model = with_lora(llama()) if lora else llama()
        trainer = make(
            model, tiny_tokenizer, tmp_path, max_steps=2, mask_learning_rate=0.5, mask_eta=0.3, **arguments
        )  # fmt: skip
        stirred(trainer.mask_head)
        start = [parameter.detach().clone() for parameter in trainer.mask_head.parameters()]
        trainer.train()
        return torch.cat([(b - a).flatten() for a, b in zip(start, trainer.mask_head.parameters(), strict=True)])

    parts, whole = run(per_device_train_batch_size=1, gradient_accumulation_steps=4), run()
    assert float(whole.detach().norm()) > 1e-3
    assert error(parts.detach(), whole.detach()) <= 1e-4


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_resumed_run_goes_on_as_an_unbroken_one(
    lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def start() -> Any:
        model = with_lora(llama(), dropout=0.1) if lora else llama()
        return make(
            model, tiny_tokenizer, tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=2, mask_hidden=4,
            optim="adamw_torch", lr_scheduler_type="linear", mask_learning_rate=0.1, mask_eta=0.5,
        )  # fmt: skip

    unbroken = start()
    unbroken.train()
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for part in ("model", "mask_head"):
        weights = weights_of(getattr(unbroken, part))
        assert all(torch.equal(value, weights[name]) for name, value in weights_of(getattr(resumed, part)).items())
    assert logged(resumed, "mask/k") == logged(unbroken, "mask/k")
    (tmp_path / "run" / "checkpoint-4" / HEAD_FILE).unlink()
    with pytest.raises(InputError, match="it is of a run without token masking"):
        start().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_what_is_saved_is_a_model_like_any_other(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = make(llama(), tiny_tokenizer, tmp_path, mask_learning_rate=0.5)
    trainer.train()
    trainer.save_model()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = weights_of(trainer.model)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(model).items())
    head = MaskHead(16, start=0.0)
    load_head(head, tmp_path)
    assert torch.equal(head.outer.weight, trainer.mask_head.outer.weight)
    with pytest.raises(InputError, match="the mask_hidden of the run that saved it"):
        load_head(MaskHead(16, hidden=3, start=0.0), tmp_path)
    (tmp_path / HEAD_FILE).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read"):
        load_head(head, tmp_path)


def test_the_best_model_has_its_own_head(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = make(
        llama(), tiny_tokenizer, tmp_path, options={"eval_dataset": data_for("dpo")}, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, mask_learning_rate=5.0,
        metric_for_best_model="eval_mask/k", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    best = MaskHead(16, start=0.0)
    load_head(best, tmp_path / "checkpoint-1")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert torch.equal(best.outer.weight, trainer.mask_head.outer.weight)


def test_the_head_draws_no_random_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    heads = [MaskHead(16, hidden=4, start=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0].inner.weight, heads[1].inner.weight)
    assert not torch.equal(heads[0].inner.weight, heads[2].inner.weight)
    assert heads[0](torch.randn(3, 5, 16, dtype=torch.bfloat16)).tolist() == [[2.0] * 5] * 3
    save_head(heads[0], tmp_path, {})
    load_head(heads[2], tmp_path)
    assert torch.equal(heads[0].inner.weight, heads[2].inner.weight)


def test_the_callback_measures_the_model_beside_it(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [EntanglementCallback(every=1, on_error="raise")]):
        trainer = make(llama(), tiny_tokenizer, tmp_path, mask_learning_rate=0.5, options={"callbacks": callbacks})
        stirred(trainer.mask_head)
        trainer.train()
        runs.append(weights_of(trainer.model) | weights_of(trainer.mask_head))
    assert [record.gram.coverage for record in callbacks[0].records] == [1.0] * 3
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_ranks_are_one_process(kind: str, tmp_path: Path) -> None:
    two, other, one = two_and_one(rank_masked.main, tmp_path, kind)
    assert two["model"] == other["model"] and two["head"] == other["head"]
    for part in ("model", "head"):
        moves = [torch.tensor(run[part], dtype=torch.float64) for run in (two, one)]
        assert float(moves[1].norm()) > 1e-2
        assert error(*moves) <= 5e-5  # differences of weights, rounded in float32
    for mine, right in zip(two["logs"], one["logs"], strict=True):
        assert mine == pytest.approx(right, rel=1e-4)
    assert two["rows"] == one["rows"] > 0
