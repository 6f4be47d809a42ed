"""Pairwise normalized gradient descent: the gradient is the definition's, and the trainer is TRL's in all the rest."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from gradent import GradentWarning
from gradent.trainer.pairwise.config import PairwiseNormalizedDPOConfig
from gradent.trainer.pairwise.trainer import PairwiseNormalizedDPOTrainer
from tests.trainer.runs import data_for, llama, weights_of, with_lora
from tests.truth import call

SETTINGS = {
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant",
    "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
    "activation_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "seed": 7,
}  # fmt: skip
OURS = {"scale", "C", "preference_loss", "preference_loss_kwargs", "memory_budget"}


def make(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path, *, ref: nn.Module | None = None,
    plain: bool = False, data: Dataset | None = None, callbacks: Any = (), **arguments: Any,
) -> Any:  # fmt: skip
    """The trainer under test, or TRL's own with the same settings."""
    trainer, config = (DPOTrainer, DPOConfig) if plain else (PairwiseNormalizedDPOTrainer, PairwiseNormalizedDPOConfig)
    given = {key: value for key, value in arguments.items() if not plain or key not in OURS}
    return trainer(
        model=model,
        ref_model=ref,
        args=config(**{"output_dir": str(out), **SETTINGS, **given}),
        train_dataset=data_for("dpo") if data is None else data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def flat(grads: list[Tensor | None], like: list[Tensor]) -> Tensor:
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=torch.float64) if grad is None else grad.detach().double().flatten()
            for grad, p in zip(grads, like, strict=True)
        ]
    )


def batch_gradient(trainer: Any) -> tuple[dict[str, Tensor], float, Tensor]:
    """The first batch, the loss that is reported of it, and the gradient of one backward."""
    trainer.model.train()
    if trainer.args.activation_checkpointing:  # as `train` does
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return batch, loss.item(), flat([parameter.grad for parameter in parameters], parameters)


def logged(trainer: Any, name: str) -> list[float]:
    """What is to be logged next."""
    return trainer._metrics["train"][f"pairwise/{name}"]  # noqa: SLF001  (TRL has no public name for it)


def row_gradients(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`∇ log π(y|x)` of every row, `[2B, P]` float64: one plain backward of an unpadded row each."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for row in range(len(batch["input_ids"])):
        keep = batch["attention_mask"][row].bool()
        ids, marks = batch["input_ids"][row][keep], batch["completion_mask"][row][keep].bool()
        logps = call(model, ids[None])[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        grads = torch.autograd.grad(logps[marks[1:]].sum(), parameters, allow_unused=True)
        rows.append(flat(list(grads), parameters))
    return torch.stack(rows)


def definition(rows: Tensor, coefficients: Tensor, scale: str = "loss", factor: float = 1.0) -> Tensor:
    """`-Σ_i C_i (g_w/‖g_w‖ - g_l/‖g_l‖) / B`, `coefficients` those of the rows in the plain loss's gradient."""
    pairs = len(rows) // 2
    norms = rows.norm(dim=1)
    d_w, d_l = -coefficients[:pairs] * pairs, coefficients[pairs:] * pairs
    scales = {"weight": (d_w + d_l) / 2, "constant": torch.ones(pairs)}
    scales["loss"] = (d_w * norms[:pairs] + d_l * norms[pairs:]) / 2
    units = rows / norms[:, None]
    return -factor * (scales[scale][:, None] * (units[:pairs] - units[pairs:])).sum(0) / pairs


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def both(
    model: Callable[[], nn.Module], tokenizer: PreTrainedTokenizerFast, out: Path, *, ref: nn.Module | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Our gradient; the rows' true gradients; their coefficients in TRL's gradient, by least squares; and that."""
    exact = copy.deepcopy(model()).double().eval()
    batch, plain_loss, plain = batch_gradient(make(model(), tokenizer, out, ref=ref, plain=True, **arguments))
    rows = row_gradients(exact, batch)
    coefficients = torch.linalg.lstsq(rows.T, plain[:, None]).solution[:, 0]
    _, loss, ours = batch_gradient(make(model(), tokenizer, out, ref=ref, **arguments))
    assert loss == plain_loss
    return ours, rows, coefficients, plain


@pytest.fixture
def gpt2(tiny_gpt2: GPT2LMHeadModel) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(tiny_gpt2)


def moved(model: nn.Module, seed: int = 5) -> nn.Module:
    """A reference: another model nearby."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return other


@pytest.mark.parametrize("scale", ["loss", "weight", "constant"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "checkpointing"])
def test_float64(
    scale: str, recomputed: bool, gpt2: Callable[[], nn.Module], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ours, rows, coefficients, plain = both(
        gpt2, tiny_tokenizer, tmp_path, ref=moved(gpt2()), scale=scale, C=2.0, activation_checkpointing=recomputed
    )
    assert error(coefficients @ rows, plain) <= 1e-6
    assert error(ours, definition(rows, coefficients, scale, 2.0)) <= 1e-6
    assert error(ours, plain) > 1e-2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "checkpointing"])
def test_float32(lora: bool, recomputed: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return with_lora(llama()) if lora else llama()

    with warnings.catch_warnings():
        warnings.simplefilter("error", GradentWarning)
        ours, rows, coefficients, _ = both(
            model, tiny_tokenizer, tmp_path, ref=None if lora else llama(seed=3), activation_checkpointing=recomputed
        )
    assert error(ours, definition(rows, coefficients)) <= 1e-6


LOSSES: dict[str, dict[str, Any]] = {
    "hinge": {}, "ipo": {}, "exo_pair": {"label_smoothing": 0.1}, "nca_pair": {}, "robust": {"label_smoothing": 0.1},
    "bco_pair": {}, "sppo_hard": {}, "aot": {}, "aot_unpaired": {}, "apo_zero": {}, "discopop": {}, "sigmoid_norm": {},
    "sigmoid": {"use_weighting": True}, "forward_kl": {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
    "mixed": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_trl(
    name: str, gpt2: Callable[[], nn.Module], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    arguments = {"loss_type": [name], **LOSSES[name]}
    ours, rows, coefficients, plain = both(gpt2, tiny_tokenizer, tmp_path, ref=moved(gpt2()), **arguments)
    assert error(coefficients @ rows, plain) <= 1e-6
    assert error(ours, definition(rows, coefficients)) <= 1e-6


@pytest.mark.parametrize(
    ("name", "loss_type", "hyper"),
    [("dpo", "sigmoid", {"beta": 0.1}), ("ipo", "ipo", {"beta": 0.1, "length_normalized": True})],
)
def test_losses_of_gradent_are_those_of_trl(
    name: str,
    loss_type: str,
    hyper: dict[str, Any],
    gpt2: Callable[[], nn.Module],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    reference = moved(gpt2())
    trls = make(gpt2(), tiny_tokenizer, tmp_path, ref=copy.deepcopy(reference), loss_type=[loss_type])
    given = make(
        gpt2(), tiny_tokenizer, tmp_path, ref=reference, preference_loss=name, preference_loss_kwargs=hyper
    )  # the reported loss is then another: TRL's default
    _, loss, want = batch_gradient(trls)
    _, _, got = batch_gradient(given)
    assert error(got, want) <= 1e-6
    assert logged(given, "preference_loss") == [pytest.approx(loss, rel=1e-5)]
    assert given.precompute_ref_logps is False


def test_a_loss_without_reference(
    gpt2: Callable[[], nn.Module], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options = {"preference_loss": "simpo", "preference_loss_kwargs": {"beta": 2.0, "gamma": 0.5}}
    trainer = make(gpt2(), tiny_tokenizer, tmp_path, ref=moved(gpt2()), **options)
    batch, _, got = batch_gradient(trainer)
    rows = row_gradients(gpt2().eval(), batch)
    pairs = len(rows) // 2
    lengths = batch["completion_mask"][:, 1:].sum(1)
    with torch.no_grad():
        out = trainer.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], fused_lm_head=True, use_cache=False,
            labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
        ).log_probs.sum(1) / lengths  # fmt: skip
    slope = 2.0 * torch.sigmoid(-(2.0 * (out[:pairs] - out[pairs:]) - 0.5))
    coefficients = torch.cat([-slope, slope]) / lengths / pairs
    assert error(got, definition(rows, coefficients.double())) <= 1e-6


def test_precomputed_reference(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    gradients = [
        batch_gradient(
            make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3), precompute_ref_log_probs=early, **more)
        )
        for more in ({}, {"preference_loss": "dpo"})
        for early in (False, True)
    ]
    for _, _, got in gradients[1:]:
        assert error(got, gradients[0][2]) <= 1e-6


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_accumulation_is_one_larger_batch(lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def run(**arguments: Any) -> dict[str, Tensor]:
        model = with_lora(llama()) if lora else llama()
        trainer = make(model, tiny_tokenizer, tmp_path, ref=None if lora else llama(seed=3), max_steps=1, **arguments)
        trainer.train()
        return weights_of(trainer.model)

    whole = run()
    parts = run(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    start = weights_of(with_lora(llama()) if lora else llama())
    moves = [torch.cat([(end[name] - start[name]).flatten() for name in start]) for end in (parts, whole)]
    assert float(moves[1].norm()) > 1e-3
    assert error(*moves) <= 2e-5  # differences of weights, rounded in float32


def test_bf16_autocast(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradentWarning)
        trainers = [make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3), bf16=bf16) for bf16 in (False, True)]
        grads = []
        for trainer in trainers:
            trainer.model = trainer.accelerator.prepare_model(trainer.model)
            grads.append(batch_gradient(trainer)[2])
    assert 1e-5 < error(grads[1], grads[0]) <= 5e-2


def test_experts_one_backward_a_response(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Beside an auxiliary loss rows are not told apart, and it is said so; that loss keeps its own gradient."""

    def model() -> nn.Module:
        config = MixtralConfig(
            vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, initializer_range=0.2, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            mixture = MixtralForCausalLM(config)
        mixture.set_experts_implementation("eager")
        return mixture

    ours, rows, coefficients, _ = both(model, tiny_tokenizer, tmp_path, ref=moved(model()), router_aux_loss_coef=0.0)
    assert error(ours, definition(rows, coefficients)) <= 1e-5

    def routed(coefficient: float, *, plain: bool) -> Tensor:
        options = {"plain": plain, "router_aux_loss_coef": coefficient}
        return batch_gradient(make(model(), tiny_tokenizer, tmp_path, ref=moved(model()), **options))[2]

    with pytest.warns(GradentWarning, match="one backward a response"):
        ours = routed(1.0, plain=False) - routed(0.0, plain=False)
    parts = [ours, routed(1.0, plain=True) - routed(0.0, plain=True)]
    assert float(parts[1].norm()) > 0
    assert error(*parts) <= 1e-3


def test_a_response_without_a_gradient(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3))
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    batch["completion_mask"][0] = 0
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in trainer.model.parameters() if p.grad is not None)
    assert logged(trainer, "zero_norm") == [0.125]
