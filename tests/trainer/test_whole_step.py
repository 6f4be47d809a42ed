"""The account of steps that have no split (Muon, Lion, Adafactor): their total, against float64 autograd."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from gradent import EntanglementCallback
from gradent.pairs.batch import PairBatch
from gradent.record.stream import read_stream
from tests.trainer.runs import Gradients, llama, make_trainer, weights_of, with_lora
from tests.trainer.test_identity import states, traces
from tests.truth import call

TOLERANCE = 1e-5
"""Largest error of a total, scaled by `‖g_i‖‖Δθ‖`."""


class Lion(torch.optim.Optimizer):
    """The sign of a moving average, with decoupled decay."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3, beta: float = 0.9, decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for part in group["params"]:
                if part.grad is None:
                    continue
                moment = self.state[part].setdefault("moment", torch.zeros_like(part))
                update = (group["beta"] * moment + (1 - group["beta"]) * part.grad).sign()
                part.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                moment.lerp_(part.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "Lion": Lion,
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on; it takes matrices alone
    OPTIMIZERS["Muon"] = lambda parameters: torch.optim.Muon(parameters, lr=1e-2)


def trained(model: nn.Module) -> list[Tensor]:
    return [part for part in model.parameters() if part.requires_grad]


def of_matrices(lora: bool) -> nn.Module:
    """A model whose trainable parameters are matrices."""
    model = with_lora(llama()) if lora else llama()
    for part in model.parameters():
        part.requires_grad_(part.requires_grad and part.dim() == 2)
    return model


def totals(before: nn.Module, after: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """`⟨g_i, Δθ⟩` of every row and `‖g_i‖‖Δθ‖`, by float64 autograd at the parameters before the step."""
    model = copy.deepcopy(before).double().eval()
    parameters = trained(model)
    step = [new.detach().double() - old.detach() for new, old in zip(trained(after), parameters, strict=True)]
    size = torch.cat([part.flatten() for part in step]).norm()
    found, scales = [], []
    for row in range(2 * len(batch)):
        ids, marks = batch.row(row)
        logps = call(model, ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        grads = torch.autograd.grad(logps[marks[1:].bool()].sum(), parameters)
        found.append(sum((grad * part).sum() for grad, part in zip(grads, step, strict=True)))
        scales.append(torch.cat([grad.flatten() for grad in grads]).norm() * size)
    return torch.stack(found), torch.stack(scales)


def said_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.getMessage() for line in caplog.records if line.name == "gradent"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_total_is_along_the_step_that_was_taken(
    name: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = of_matrices(lora)
    callback = EntanglementCallback(every=1, alert=None, realised=True, on_error="raise", out=tmp_path / "out")
    seen = Gradients(model)
    with caplog.at_level(logging.WARNING, "gradent"):
        trainer = make_trainer(
            "dpo", model, tiny_tokenizer, tmp_path, [callback, seen], max_steps=3, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_grad_norm=1e-3,
            options={"optimizers": (OPTIMIZERS[name](trained(model)), None)},
        )  # fmt: skip
        trainer.train()
    assert len(callback.records) == 3
    for number, record in enumerate(callback.records):
        account = record.attribution
        assert record.source == "piggyback" and account is not None and tuple(account.moved) == ("step",)
        want, scale = totals(seen.models[number], seen.models[number + 1], record.batch)
        assert float(((account.total - want).abs() / scale).max()) <= TOLERANCE
        assert float(want.abs().max()) > 0 and account.is_whole
        assert account.products.shape == account.pushes.shape == (8, 8)
        assert bool(account.products.isnan().all()) and bool(account.pushes.isnan().all())
        assert account.explained is not None and account.explained > 0.5
        assert record.overhead_s > 0
    (said,) = said_in(caplog)
    assert "does not split steps into sources" in said and name in said
    for number, logs in enumerate(trainer.state.log_history[:3]):
        account = callback.records[number].attribution
        for half, side in ((slice(4), "chosen"), (slice(4, 8), "rejected")):
            assert logs[f"gradent/moved/{side}/step"] == pytest.approx(float(account.total[half].mean()))
            assert f"gradent/moved/{side}/own" not in logs
        assert logs["gradent/explained"] == pytest.approx(account.explained)
    columns = read_stream(tmp_path / "out" / "pairs.jsonl")
    assert columns["chosen_moved_step"][:4] == callback.records[0].attribution.total[:4].tolist()
    assert columns["chosen_moved_own"][:4] == [None] * 4


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_to_the_bit(name: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def run(callbacks: list[EntanglementCallback]) -> list[Any]:
        model = of_matrices(lora)
        optimizer = OPTIMIZERS[name](trained(model))
        trainer = make_trainer(
            "dpo", model, tiny_tokenizer, tmp_path, callbacks, max_steps=3, options={"optimizers": (optimizer, None)}
        )
        trainer.train()
        return [weights_of(trainer.model), states(), [log["loss"] for log in trainer.state.log_history[:3]],
                traces(trainer.model)]  # fmt: skip

    callback = EntanglementCallback(every=1, on_error="raise")
    (ours, *others), (theirs, *alone) = run([callback]), run([])
    assert all(record.attribution is not None for record in callback.records) and len(callback.records) == 3
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert others == alone


def lion_run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    name: str = "dpo",
    optimizer: Any = None,
    **options: Any,
) -> EntanglementCallback:
    callback = EntanglementCallback(every=1, alert=None, on_error="raise", **options)
    optimizer = Lion(trained(model)) if optimizer is None else optimizer
    make_trainer(name, model, tokenizer, out, [callback], options={"optimizers": (optimizer, None)}).train()
    assert len(callback.records) == 2
    return callback


def test_forward_mode_is_kept_to_under_mixed_precision(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """accelerate's autocast stands inside the model's forward: rounding is bfloat16's, and no failure."""
    model, callback = llama(), EntanglementCallback(every=1, alert=None, on_error="raise")
    seen = Gradients(model)
    with caplog.at_level(logging.WARNING, "gradent"):
        make_trainer(
            "dpo", model, tiny_tokenizer, tmp_path, [callback, seen], bf16=True,
            options={"optimizers": (Lion(trained(model)), None)},
        ).train()  # fmt: skip
    for number, record in enumerate(callback.records):
        want, scale = totals(seen.models[number], seen.models[number + 1], record.batch)
        assert float(((record.attribution.total - want).abs() / scale).max()) <= 5e-3
    (said,) = said_in(caplog)
    assert "does not split steps" in said


def test_a_copy_that_has_no_room(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gradent"):
        callback = lion_run(llama(), tiny_tokenizer, tmp_path, memory_budget=4096)
    assert [record.attribution for record in callback.records] == [None, None]
    (said,) = said_in(caplog)
    assert "gives no account of steps: tests.Lion" in said and "memory_budget=4096" in said


def test_an_optimizer_that_steps_inside_the_backward(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Idle(Lion):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    model = llama()
    inner = {part: Lion([part]) for part in model.parameters()}
    for part in model.parameters():
        part.register_post_accumulate_grad_hook(lambda part: inner[part].step())
    with caplog.at_level(logging.WARNING, "gradent"):
        callback = lion_run(model, tiny_tokenizer, tmp_path, optimizer=Idle(trained(model)))
    assert [record.attribution for record in callback.records] == [None, None]
    (said,) = said_in(caplog)
    assert "Idle" in said and "it steps inside the backward" in said


def test_a_model_without_a_forward_derivative(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0]

    def opaque() -> nn.Module:
        model = llama()
        norm = model.model.norm
        norm.forward = lambda x, plain=norm.forward: Opaque.apply(plain(x))
        return model

    with caplog.at_level(logging.WARNING, "gradent"):
        found = lion_run(opaque(), tiny_tokenizer, tmp_path)
    want = lion_run(llama(), tiny_tokenizer, tmp_path)
    for one, other in zip(found.records, want.records, strict=True):
        torch.testing.assert_close(one.attribution.total, other.attribution.total, rtol=1e-4, atol=1e-7)
    said = said_in(caplog)
    assert len([line for line in said if "by one backward pass a response" in line]) == 1
    assert len([line for line in said if "does not split steps" in line]) == 2  # of two runs, one each


def test_a_reward_model(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama(kind=LlamaForSequenceClassification, num_labels=1)
    with caplog.at_level(logging.WARNING, "gradent"):
        callback = lion_run(model, tiny_tokenizer, tmp_path, "reward")
    assert [record.attribution for record in callback.records] == [None, None]
    assert "a reward model's total is not taken" in "".join(said_in(caplog))
