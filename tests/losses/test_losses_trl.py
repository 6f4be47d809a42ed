"""The losses that TRL has, against the numbers TRL's own trainers compute.

A real trainer computes its own loss on log-probs that a stand-in for the model hands it: the gradients that arrive at
those log-probs are `-d_w/B` and `+d_l/B`. CPO's likelihood term is built from logits, so there the model is real.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from packaging.version import Version  # noqa: E402

from gradent import losses  # noqa: E402
from gradent.errors import InputError  # noqa: E402
from gradent.losses.trl import TRL_TYPES  # noqa: E402

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="drives the trainers of TRL 1.15 and later (log_probs outputs)"
)

F64 = torch.float64
B = 16
LONGEST = 9
SETTINGS = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True}
PAIRS = [{"prompt": "So", "chosen": " good", "rejected": " no"}] * 2


@pytest.fixture
def pairs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    data = {
        key: -40 * torch.rand(B, generator=draw, dtype=F64)
        for key in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    }
    return data | {key: torch.randint(1, LONGEST, (B,), generator=draw) for key in ("chosen_len", "rejected_len")}


def stand_in(rows: Tensor):
    """A model whose forward gives each row its log-prob, all of it at the first position, as TRL's fused head would."""

    def forward(**inputs):
        per_token = torch.zeros(inputs["input_ids"].shape[0], inputs["input_ids"].shape[1] - 1, dtype=rows.dtype)
        per_token = torch.cat([rows[:, None], per_token[:, 1:]], dim=1)
        zeros = torch.zeros_like(per_token)
        return SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    return forward


def token_batch(lengths: Tensor) -> dict[str, Tensor]:
    positions = torch.arange(LONGEST + 1)
    completion = (positions >= 1) & (positions <= lengths[:, None])
    real = (positions <= lengths[:, None]).long()
    return {"input_ids": real, "attention_mask": real, "completion_mask": completion.long()}


def trl_gradients(loss: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`(d_w, d_l)` that TRL's mean over B pairs puts at the log-probs."""
    (gradient,) = torch.autograd.grad(loss, rows)
    return -B * gradient[:B], B * gradient[B:]


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], exact: float = 1e-10) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert theirs.abs().max() > 0 or (ours == 0).all()
        torch.testing.assert_close(ours, theirs.to(F64), rtol=exact, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "hyper", "loss_type", "beta"),
    [
        ("dpo", {"beta": 0.1}, "sigmoid", 0.1),
        ("dpo", {"beta": 0.5}, "sigmoid", 0.5),
        ("ipo", {"beta": 0.1, "length_normalized": True}, "ipo", 0.1),
        ("sppo", {"beta": 0.05}, "sppo_hard", 0.05),
        ("rdpo", {"beta": 0.1, "alpha": 0.0}, "sigmoid", 0.1),
        ("dpop", {"beta": 0.1, "lam": 0.0}, "sigmoid", 0.1),
        *(
            (name, {"beta": beta}, name, beta)
            for name in TRL_TYPES
            for beta in (0.1, 0.5)
            if name not in {"robust", "exo_pair", "ipo"}
        ),
        ("robust", {"beta": 0.1, "label_smoothing": 0.1}, "robust", 0.1),
        ("exo_pair", {"beta": 0.1, "label_smoothing": 0.2}, "exo_pair", 0.1),
    ],
)
def test_dpo_trainer(name, hyper, loss_type, beta, tmp_path, tiny_gpt2, tiny_tokenizer, pairs):
    smoothing = {key: value for key, value in hyper.items() if key == "label_smoothing"}
    trainer = trl.DPOTrainer(
        tiny_gpt2,
        ref_model=copy.deepcopy(tiny_gpt2),
        args=trl.DPOConfig(str(tmp_path), loss_type=[loss_type], beta=beta, **smoothing, **SETTINGS),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer,
    )
    trainer.ref_model = stand_in(torch.cat([pairs["ref_chosen_logp"], pairs["ref_rejected_logp"]]))
    rows = torch.cat([pairs["chosen_logp"], pairs["rejected_logp"]]).requires_grad_()
    batch = token_batch(torch.cat([pairs["chosen_len"], pairs["rejected_len"]]))
    theirs = trainer.compute_loss(stand_in(rows), batch)
    ours = losses.get(name, **hyper)
    exact = 1e-7 if loss_type == "exo_pair" else 1e-10  # TRL has its ε in float32
    shift = 2.0 if loss_type == "apo_zero" else 0.0  # KTO is without its constants
    torch.testing.assert_close(ours.value(**pairs).mean() + shift, theirs.detach(), rtol=exact, atol=0)
    d_w, d_l = ours.weights(**pairs)
    wanted = trl_gradients(theirs, rows)
    assert_same((d_w, d_l), wanted, 100 * exact if loss_type == "exo_pair" else exact)
    for wrong in ((-d_w, d_l), (d_w, -d_l), (d_w.roll(1), d_l)):
        with pytest.raises(AssertionError):
            assert_same(wrong, wanted)


@pytest.mark.parametrize(
    "arguments",
    [
        {"f_divergence_type": "forward_kl"}, {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
        {"loss_type": ["ipo", "hinge"], "beta": 0.3, "f_divergence_type": "js_divergence"},
        {"loss_type": ["discopop"], "discopop_tau": 0.3},
    ],
)  # fmt: skip
def test_what_dpo_config_says_of_its_loss(arguments, tmp_path, tiny_gpt2, tiny_tokenizer, pairs):
    trainer = trl.DPOTrainer(
        tiny_gpt2,
        ref_model=copy.deepcopy(tiny_gpt2),
        args=trl.DPOConfig(str(tmp_path), **arguments, **SETTINGS),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer,
    )
    small = {key: value / 20 if "logp" in key else value for key, value in pairs.items()}  # nothing overflows
    exact = 1e-10
    if arguments.get("f_alpha_divergence_coef") == 0.3:  # TRL knows no float64 there
        small, exact = {key: value.float() if "logp" in key else value for key, value in small.items()}, 1e-4
    trainer.ref_model = stand_in(torch.cat([small["ref_chosen_logp"], small["ref_rejected_logp"]]))
    rows = torch.cat([small["chosen_logp"], small["rejected_logp"]]).requires_grad_()
    batch = token_batch(torch.cat([small["chosen_len"], small["rejected_len"]]))
    theirs = trainer.compute_loss(stand_in(rows), batch)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    ours = losses.from_trl(given.pop("loss_type", ("sigmoid",)), given)
    torch.testing.assert_close(ours.value(**small).mean(), theirs.detach().to(F64), rtol=exact, atol=0)
    assert_same(ours.weights(**small), trl_gradients(theirs, rows), exact)


def test_the_papers_losses_by_trls_names():
    assert losses.get("sigmoid", beta=0.3) == losses.get("dpo", beta=0.3)
    assert losses.get("sppo_hard", beta=0.3) == losses.get("sppo", beta=0.3)
    assert losses.get("apo_zero", beta=0.3) == losses.get("kto", beta=0.3)
    both = losses.from_trl(("sigmoid", "hinge"), {"loss_weights": (0.8, 0.2)})
    assert both.name == "0.8 sigmoid + 0.2 hinge"


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft"])
def test_what_is_no_loss_of_a_pair_is_refused(name):
    with pytest.raises(InputError, match=f"TRL's {name} is no loss of a pair: it"):
        losses.get(name)


def test_dpo_trainer_hinge_is_slic_on_log_ratios(tmp_path, tiny_gpt2, tiny_tokenizer, pairs):
    """TRL's hinge, `max(0, 1 - βΔ)`, is SLiC without likelihood term at δ = 1/β on log-ratios, times β."""
    trainer = trl.DPOTrainer(
        tiny_gpt2,
        ref_model=copy.deepcopy(tiny_gpt2),
        args=trl.DPOConfig(str(tmp_path), loss_type=["hinge"], beta=0.1, **SETTINGS),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer,
    )
    trainer.ref_model = stand_in(torch.cat([pairs["ref_chosen_logp"], pairs["ref_rejected_logp"]]))
    rows = torch.cat([pairs["chosen_logp"], pairs["rejected_logp"]]).requires_grad_()
    theirs = trainer.compute_loss(stand_in(rows), token_batch(torch.cat([pairs["chosen_len"], pairs["rejected_len"]])))
    ratios = {f"{side}_logp": pairs[f"{side}_logp"] - pairs[f"ref_{side}_logp"] for side in ("chosen", "rejected")}
    d_w, d_l = losses.get("slic", delta=10.0, lam=0.0).weights(**ratios)
    assert 0 < d_w.mean() < 1
    assert_same((0.1 * d_w, 0.1 * d_l), trl_gradients(theirs, rows))


def test_kto_trainer(tmp_path, tiny_gpt2, tiny_tokenizer, pairs):
    completions = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in PAIRS
        for side in ("chosen", "rejected")
    ]
    arguments = trl.KTOConfig(
        str(tmp_path), beta=0.1, desirable_weight=1.0, undesirable_weight=1.3, per_device_train_batch_size=2, **SETTINGS
    )
    trainer = trl.KTOTrainer(
        tiny_gpt2,
        ref_model=copy.deepcopy(tiny_gpt2),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(completions),
        processing_class=tiny_tokenizer,
    )
    rows = torch.cat([pairs["chosen_logp"], pairs["rejected_logp"]]).requires_grad_()
    reference = torch.cat([pairs["ref_chosen_logp"], pairs["ref_rejected_logp"]])
    kl = 2.5

    def split(rows: Tensor, kl_rows: Tensor):
        # The trainer calls the model once for its KL estimate, under no_grad, and once for the loss.
        return lambda **inputs: stand_in(rows if inputs["input_ids"].max() == 1 else kl_rows)(**inputs)

    trainer.ref_model = split(reference, torch.zeros(2 * B, dtype=F64))
    batch = token_batch(torch.cat([pairs["chosen_len"], pairs["rejected_len"]]))
    batch |= {
        "KL_input_ids": 2 * batch["input_ids"],
        "KL_attention_mask": batch["attention_mask"],
        "KL_completion_mask": batch["completion_mask"],
        "label": torch.arange(2 * B) < B,
    }
    theirs = trainer.compute_loss(split(rows, torch.full((2 * B,), kl, dtype=F64)), batch)
    ours = losses.get("kto", beta=0.1, lambda_w=1.0, lambda_l=1.3, z_ref=0.1 * kl)
    # TRL averages over 2B completions, not over B pairs, and keeps the constant λ_w + λ_l.
    torch.testing.assert_close((ours.value(**pairs) + 2.3).mean() / 2, theirs.detach(), rtol=1e-10, atol=0)
    assert_same(ours.weights(**pairs), trl_gradients(2 * theirs, rows))


def cpo_trainer(tmp_path, model, tokenizer, **settings):
    cpo = pytest.importorskip("trl.experimental.cpo")
    return cpo.CPOTrainer(
        model,
        args=cpo.CPOConfig(str(tmp_path), remove_unused_columns=False, **settings, **SETTINGS),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    ("name", "hyper", "settings"),
    [
        ("simpo", {"beta": 2.0, "gamma": 0.5}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
        ("simpo", {}, {"loss_type": "simpo"}),
        ("cpo", {"lam": 0.0}, {"loss_type": "sigmoid"}),
        ("slic", {"delta": 1.0, "lam": 0.0}, {"loss_type": "hinge", "beta": 1.0}),
    ],
)
def test_cpo_trainer_preference_term(name, hyper, settings, tmp_path, tiny_gpt2, tiny_tokenizer, pairs):
    trainer = cpo_trainer(tmp_path, tiny_gpt2, tiny_tokenizer, **settings)
    rows = torch.cat([pairs["chosen_logp"], pairs["rejected_logp"]]).requires_grad_()
    lengths = torch.cat([pairs["chosen_len"], pairs["rejected_len"]]) if name == "simpo" else 1
    # cpo_loss takes what its get_batch_logps gives: averages for simpo, sums otherwise.
    theirs = trainer.cpo_loss(*(rows / lengths).chunk(2))[0]
    ours = losses.get(name, **hyper)
    torch.testing.assert_close(ours.value(**pairs), theirs.detach(), rtol=1e-10, atol=1e-14)
    assert_same(ours.weights(**pairs), trl_gradients(theirs.mean(), rows))


@pytest.mark.parametrize(
    ("name", "hyper", "settings"),
    [
        ("cpo", {"beta": 0.3, "lam": 1.0}, {"loss_type": "sigmoid", "beta": 0.3}),
        ("slic", {"delta": 1.0, "lam": 1.0}, {"loss_type": "hinge", "beta": 1.0}),
        ("simpo", {"beta": 2.0, "gamma": 0.5}, {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}),
    ],
)
def test_cpo_trainer_whole_loss_on_a_model(name, hyper, settings, tmp_path, tiny_gpt2, tiny_tokenizer):
    """One pair, so that TRL's average over the batch's chosen tokens is the pair's sum over its length."""
    trainer = cpo_trainer(tmp_path, tiny_gpt2, tiny_tokenizer, **settings)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    logps, lengths = {}, {}
    for side in ("chosen", "rejected"):
        ids, marks = batch[f"{side}_input_ids"], batch[f"{side}_labels"] != -100
        steps = torch.log_softmax(tiny_gpt2(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        logps[f"{side}_logp"], lengths[f"{side}_len"] = steps[marks[0, 1:]].sum()[None], marks.sum(1)
    trainer.cpo_alpha *= lengths["chosen_len"].item()
    theirs = trainer.get_batch_loss_metrics(tiny_gpt2, batch)[0]
    ours = losses.get(name, **hyper)
    torch.testing.assert_close(ours.value(**logps, **lengths)[0], theirs, rtol=1e-10, atol=0)

    d_w, d_l = ours.weights(**logps, **lengths)
    parameters = list(tiny_gpt2.parameters())
    gradient = torch.autograd.grad(theirs, parameters)
    chosen = torch.autograd.grad(logps["chosen_logp"], parameters)
    rejected = torch.autograd.grad(logps["rejected_logp"], parameters)
    for whole, g_w, g_l in zip(gradient, chosen, rejected, strict=True):
        torch.testing.assert_close(whole, -(d_w * g_w - d_l * g_l), rtol=1e-9, atol=1e-12)
