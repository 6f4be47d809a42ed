"""The ten losses against autograd of the losses as their own papers write them, float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from gradent import losses
from gradent.errors import InputError, NonFiniteError

F64 = torch.float64
B = 400


def softplus(x: Tensor) -> Tensor:
    """`log(1 + e^x)`, so that `-log σ(x)` is `softplus(-x)`; written without logsigmoid on purpose."""
    return torch.logaddexp(torch.zeros_like(x), x)


# Each loss as its own paper writes it, over log-probs s, reference log-probs r, lengths n. No code of gradent's.


def dpo(s_w, s_l, r_w, r_l, n_w, n_l, beta):
    return softplus(-(beta * (s_w - r_w) - beta * (s_l - r_l)))


def rdpo(s_w, s_l, r_w, r_l, n_w, n_l, beta, alpha):
    reward_w, reward_l = beta * (s_w - r_w) + alpha * n_w, beta * (s_l - r_l) + alpha * n_l
    return softplus(reward_l - reward_w)


def simpo(s_w, s_l, r_w, r_l, n_w, n_l, beta, gamma):
    return softplus(-(beta / n_w * s_w - beta / n_l * s_l - gamma))


def ipo(s_w, s_l, r_w, r_l, n_w, n_l, beta, length_normalized=False):
    if length_normalized:
        s_w, s_l, r_w, r_l = s_w / n_w, s_l / n_l, r_w / n_w, r_l / n_l
    return (s_w + r_l - s_l - r_w - 0.5 / beta).square()


def rrhf(s_w, s_l, r_w, r_l, n_w, n_l, lam):
    return torch.relu(s_l / n_l - s_w / n_w) - lam * s_w


def slic(s_w, s_l, r_w, r_l, n_w, n_l, delta, lam):
    return torch.relu(delta - (s_w - s_l)) - lam * s_w


def cpo(s_w, s_l, r_w, r_l, n_w, n_l, beta, lam):
    return softplus(beta * s_l - beta * s_w) - lam * s_w


def dpop(s_w, s_l, r_w, r_l, n_w, n_l, beta, lam):
    return softplus(-beta * ((s_w - r_w) - (s_l - r_l) - lam * torch.relu(r_w - s_w)))


def kto(s_w, s_l, r_w, r_l, n_w, n_l, beta, lambda_w, lambda_l, z_ref):
    value_w = lambda_w * torch.sigmoid(beta * (s_w - r_w) - z_ref)
    value_l = lambda_l * torch.sigmoid(z_ref - beta * (s_l - r_l))
    return (lambda_w - value_w) + (lambda_l - value_l)


def sppo(s_w, s_l, r_w, r_l, n_w, n_l, beta, reference_free=False):
    if reference_free:
        return (s_w - 1 / beta).square() + (s_l + 1 / beta).square()
    eta = 1 / beta
    return (s_w - r_w - eta * (1 - 0.5)).square() + (s_l - r_l - eta * (0 - 0.5)).square()


CONFIGURATIONS = [
    (dpo, {"beta": 0.1}),
    (dpo, {"beta": 3.0}),
    (rdpo, {"beta": 0.1, "alpha": 0.2}),
    (simpo, {"beta": 2.0, "gamma": 0.5}),
    (ipo, {"beta": 0.1}),
    (ipo, {"beta": 0.1, "length_normalized": True}),
    (rrhf, {"lam": 1.0}),
    (rrhf, {"lam": 0.0}),
    (slic, {"delta": 1.0, "lam": 1.0}),
    (cpo, {"beta": 0.1, "lam": 1.0}),
    (dpop, {"beta": 0.1, "lam": 50.0}),
    (kto, {"beta": 0.1, "lambda_w": 1.0, "lambda_l": 1.33, "z_ref": 0.4}),
    (sppo, {"beta": 0.1}),
    (sppo, {"beta": 0.001, "reference_free": True}),
]
IDS = [f"{fn.__name__}-{'-'.join(map(str, hyper.values()))}" for fn, hyper in CONFIGURATIONS]
every_configuration = pytest.mark.parametrize(("fn", "hyper"), CONFIGURATIONS, ids=IDS)


def pairs(regime: str, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of B pairs: ordinary sentences, extreme log-probs and margins, or a policy next to its reference."""
    draw = torch.Generator().manual_seed(seed)
    size, spread = {"ordinary": (60.0, 5.0), "extreme": (5000.0, 4000.0), "near": (60.0, 1e-6)}[regime]

    def uniform() -> Tensor:
        return torch.rand(B, generator=draw, dtype=F64)

    chosen, rejected = -size * uniform(), -size * uniform()
    return {
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "ref_chosen_logp": chosen + spread * (2 * uniform() - 1),
        "ref_rejected_logp": rejected + spread * (2 * uniform() - 1),
        "chosen_len": torch.randint(1, 40, (B,), generator=draw),
        "rejected_len": torch.randint(1, 40, (B,), generator=draw),
    }


def away_from_kink(name: str, hyper: dict, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pairs at which the loss is differentiable."""
    distance = {
        "rrhf": data["chosen_logp"] / data["chosen_len"] - data["rejected_logp"] / data["rejected_len"],
        "slic": data["chosen_logp"] - data["rejected_logp"] - hyper.get("delta", 0.0),
        "dpop": data["chosen_logp"] - data["ref_chosen_logp"],
    }.get(name, torch.ones(B, dtype=F64))
    keep = distance.abs() > 1e-12
    assert keep.sum() > 0.95 * B
    return {key: values[keep] for key, values in data.items()}


def autograd_weights(fn, hyper: dict, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    s_w, s_l = (data[key].clone().requires_grad_() for key in ("chosen_logp", "rejected_logp"))
    rest = [data[key].to(F64) for key in ("ref_chosen_logp", "ref_rejected_logp", "chosen_len", "rejected_len")]
    value = fn(s_w, s_l, *rest, **hyper)
    grad_w, grad_l = torch.autograd.grad(value.sum(), (s_w, s_l))
    return -grad_w, grad_l, value.detach()


def assert_weights(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == F64
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@every_configuration
@pytest.mark.parametrize("regime", ["ordinary", "extreme", "near"])
def test_weights_and_value_equal_autograd_of_the_original_loss(fn, hyper, regime):
    data = away_from_kink(fn.__name__, hyper, pairs(regime))
    d_w, d_l, value = autograd_weights(fn, hyper, data)
    loss = losses.get(fn.__name__, **hyper)
    assert_weights(loss.weights(**data), (d_w, d_l))
    constant = loss.lambda_w + loss.lambda_l if fn is kto else 0.0
    torch.testing.assert_close(loss.value(**data) + constant, value, rtol=1e-10, atol=1e-12)


def test_every_loss_has_an_oracle():
    assert {fn.__name__ for fn, _ in CONFIGURATIONS} == set(losses.LOSSES)


@pytest.mark.parametrize("name", losses.available())
def test_value_is_differentiable_and_agrees_with_weights(name):
    loss = losses.get(name)
    data = away_from_kink(name, dataclasses.asdict(loss), pairs("ordinary", seed=1))
    logps = {key: data[key].clone().requires_grad_() for key in ("chosen_logp", "rejected_logp")}
    grad_w, grad_l = torch.autograd.grad(loss.value(**(data | logps)).sum(), list(logps.values()))
    assert_weights(loss.weights(**data), (-grad_w, grad_l))


@every_configuration
def test_the_check_catches_swapped_and_flipped_weights(fn, hyper):
    data = away_from_kink(fn.__name__, hyper, pairs("ordinary"))
    want = autograd_weights(fn, hyper, data)[:2]
    loss = losses.get(fn.__name__, **hyper)
    swapped = {key: data[other] for key, other in zip(data, swap(list(data)), strict=True)}
    d_w, d_l = loss.weights(**data)
    for wrong in (loss.weights(**swapped), (-d_w, d_l), (d_w, -d_l), (torch.zeros_like(d_w), torch.zeros_like(d_l))):
        with pytest.raises(AssertionError):
            assert_weights(wrong, want)


def swap(names: list[str]) -> list[str]:
    """Chosen for rejected, throughout."""
    turn = {"chosen": "rejected", "rejected": "chosen"}
    return ["_".join(turn.get(part, part) for part in name.split("_")) for name in names]


@pytest.mark.parametrize("name", losses.available())
def test_no_overflow_at_absurd_margins(name):
    extremes = torch.tensor([-1e8, -1e8, -1e-8, -0.0], dtype=F64)
    data = {
        "chosen_logp": extremes,
        "rejected_logp": extremes.flip(0),
        "ref_chosen_logp": extremes.roll(1),
        "ref_rejected_logp": extremes.roll(2),
        "chosen_len": torch.tensor([1, 9, 1, 9]),
        "rejected_len": torch.tensor([9, 1, 1, 9]),
    }
    loss = losses.get(name)
    d_w, d_l = loss.weights(**data)
    assert d_w.isfinite().all()
    assert d_l.isfinite().all()
    assert loss.value(**data).isfinite().all()


def test_tails_keep_their_digits():
    logps = {"chosen_logp": torch.tensor([500.0]), "rejected_logp": torch.tensor([0.0])}
    zero = {"ref_chosen_logp": torch.tensor([0.0]), "ref_rejected_logp": torch.tensor([0.0])}
    tail = torch.tensor([0.1], dtype=F64) * torch.tensor([-50.0], dtype=F64).exp()  # β σ(-50) = β e^-50 (1 - 2e-22)
    for loss in (losses.get("dpo"), losses.get("kto")):
        torch.testing.assert_close(loss.weights(**logps, **zero)[0], tail, rtol=1e-12, atol=0)


# Kinks and inactive hinges.


def weights_of(loss: losses.Loss, **scalars: float) -> tuple[float, float]:
    d_w, d_l = loss.weights(**{key: torch.tensor([value], dtype=F64) for key, value in scalars.items()})
    return d_w.item(), d_l.item()


@pytest.mark.parametrize(("s_w", "active"), [(-4.1, True), (-4.0, False), (-3.9, False)])
def test_rrhf_hinge(s_w, active):
    logps = {"chosen_logp": s_w, "rejected_logp": -4.0, "chosen_len": 2.0, "rejected_len": 2.0}
    assert weights_of(losses.get("rrhf", lam=0.25), **logps) == (0.25 + 0.5 * active, 0.5 * active)
    assert weights_of(losses.get("rrhf", lam=0.0), **logps) == (0.5 * active, 0.5 * active)


@pytest.mark.parametrize(("s_w", "active"), [(-3.5, True), (-3.0, False), (-2.5, False)])
def test_slic_hinge(s_w, active):
    logps = {"chosen_logp": s_w, "rejected_logp": -4.0}
    assert weights_of(losses.get("slic", delta=1.0, lam=0.25), **logps) == (0.25 + active, active)
    assert weights_of(losses.get("slic", delta=1.0, lam=0.0), **logps) == (active, active)


@pytest.mark.parametrize(("s_w", "active"), [(-5.1, True), (-5.0, False), (-4.9, False)])
def test_dpop_penalty(s_w, active):
    arguments = {"chosen_logp": s_w, "rejected_logp": -4.0, "ref_chosen_logp": -5.0, "ref_rejected_logp": -4.0}
    d_w, d_l = weights_of(losses.get("dpop", lam=50.0), **arguments)
    assert d_w == pytest.approx(d_l * (51.0 if active else 1.0), rel=1e-14)
    if not active:
        assert (d_w, d_l) == weights_of(losses.get("dpo"), **arguments)


def test_ratios_of_section_3_2_1():
    data = pairs("ordinary", seed=2)
    ratio = {name: torch.div(*losses.get(name).weights(**data)) for name in ("dpo", "rdpo", "simpo", "ipo")}
    for name in ("dpo", "rdpo", "ipo"):
        assert (ratio[name] == 1).all()
    torch.testing.assert_close(ratio["simpo"], data["rejected_len"] / data["chosen_len"].to(F64))
    d_w, d_l = losses.get("sppo", beta=0.01, reference_free=True).weights(**data)
    torch.testing.assert_close(d_w / d_l, (100 - data["chosen_logp"]) / (100 + data["rejected_logp"]))
    # A longer chosen response counts as a margin already: R-DPO's weight is smaller there.
    longer = {**data, "chosen_len": data["rejected_len"] + 10}
    assert (losses.get("rdpo").weights(**longer)[0] < losses.get("dpo").weights(**data)[0]).all()


# The interface.


def test_available_defaults_and_needs():
    assert losses.available() == ["dpo", "rdpo", "simpo", "ipo", "rrhf", "slic", "cpo", "dpop", "kto", "sppo"]
    assert list(losses.LOSSES) == losses.available()
    reference = {name for name in losses.available() if losses.get(name).needs_reference}
    lengths = {name for name in losses.available() if losses.get(name).needs_lengths}
    assert reference == {"dpo", "rdpo", "ipo", "dpop", "kto", "sppo"}
    assert lengths == {"rdpo", "simpo", "rrhf"}
    assert losses.get("ipo", length_normalized=True).needs_lengths
    assert not losses.get("sppo", reference_free=True).needs_reference
    defaults = {name: dataclasses.asdict(losses.get(name)) for name in losses.available()}
    assert all(default["name"] == name for name, default in defaults.items())
    assert all(default.get("beta", 0.1) == 0.1 for default in defaults.values())
    assert [defaults[name]["lam"] for name in ("cpo", "rrhf", "slic", "dpop")] == [1, 1, 1, 50]
    assert (defaults["slic"]["delta"], defaults["simpo"]["gamma"], defaults["rdpo"]["alpha"]) == (1, 0.5, 0.2)
    assert [defaults["kto"][name] for name in ("lambda_w", "lambda_l", "z_ref")] == [1, 1, 0]


def test_loss_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        losses.get("dpo").beta = 1.0


@pytest.mark.parametrize(
    ("name", "hyper", "said"),
    [
        ("dppo", {}, "did you mean 'dpo'"),
        ("SLiC-HF", {}, "did you mean 'slic'"),
        ("sigmoidal", {}, "did you mean 'sigmoid'"),
        ("nonsense", {}, "Accepted: dpo, rdpo"),
        ("dop", {}, "did you mean 'dpo'"),
        ("sigmoid", {"lam": 1.0}, "sigmoid has no hyperparameter 'lam'"),
        ("robust", {"label_smoothing": 0.5}, "0 to below 0.5"),
        (["dpo"], {}, "unknown loss"),
        ("dpo", {"betta": 0.1}, "did you mean 'beta'"),
        ("dpo", {"lam": 1.0}, "beta=0.1"),
        ("dpo", {"beta": 0}, "> 0"),
        ("dpo", {"beta": -0.1}, "> 0"),
        ("dpo", {"beta": float("nan")}, "> 0"),
        ("dpo", {"beta": float("inf")}, "finite"),
        ("dpo", {"beta": "0.1"}, "'0.1'"),
        ("dpo", {"beta": True}, "True"),
        ("dpo", {"beta": None}, "None"),
        ("cpo", {"lam": -1.0}, ">= 0"),
        ("slic", {"delta": -1.0}, ">= 0"),
        ("simpo", {"gamma": -0.5}, ">= 0"),
        ("kto", {"lambda_l": -1.0}, ">= 0"),
        ("kto", {"z_ref": float("nan")}, "finite"),
        ("ipo", {"length_normalized": 1}, "True or False"),
        ("sppo", {"reference_free": None}, "True or False"),
    ],
)
def test_bad_names_and_hyperparameters(name, hyper, said):
    with pytest.raises(InputError, match=said):
        losses.get(name, **hyper)


@pytest.mark.parametrize("name", losses.available())
@pytest.mark.parametrize("argument", list(pairs("ordinary")))
def test_bad_arguments(name, argument):
    loss, data = losses.get(name), pairs("ordinary")
    unused = (not loss.needs_reference and argument.startswith("ref_")) or (
        not loss.needs_lengths and argument.endswith("_len")
    )
    nan = data[argument].to(F64).clone()
    nan[7] = float("nan")
    wrong = [
        (InputError, None, argument),
        (InputError, data[argument][:, None], r"shape \[400, 1\]"),
        (InputError, data[argument][0], r"shape \[\]"),
        (InputError, "text", argument),
        (NonFiniteError, nan, f"{argument} is nan or inf for pair 7"),
    ]
    if argument != "chosen_logp":
        wrong.append((InputError, data[argument][:-1], r"shape \[399\]"))
    if argument.endswith("_len"):
        wrong.append((InputError, data[argument] * 0, "under 1 for pairs 0, 1, 2"))
    for error, value, said in wrong:
        for compute in (loss.weights, loss.value):
            if unused:
                compute(**(data | {argument: value}))
                continue
            with pytest.raises(error, match=said):
                compute(**(data | {argument: value}))


def test_weights_have_no_history_and_take_any_float_or_list():
    data = pairs("ordinary")
    tracked = {key: values.float().requires_grad_() for key, values in data.items()}
    d_w, d_l = losses.get("sppo").weights(**tracked)
    assert not d_w.requires_grad
    assert not d_l.requires_grad
    exact = {key: values.detach().double() for key, values in tracked.items()}
    assert_weights((d_w, d_l), losses.get("sppo").weights(**exact))
    assert_weights((d_w, d_l), losses.get("sppo").weights(**{key: values.tolist() for key, values in exact.items()}))


# from_callable.


def as_scalar(fn, hyper, reduce):
    def scalar(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, chosen_len, rejected_len):
        rest = (ref_chosen_logp, ref_rejected_logp, chosen_len, rejected_len)
        return reduce(fn(chosen_logp, rejected_logp, *rest, **hyper))

    return scalar


@every_configuration
def test_from_callable_gives_the_closed_forms(fn, hyper):
    data = away_from_kink(fn.__name__, hyper, pairs("ordinary", seed=3))
    known = losses.get(fn.__name__, **hyper)
    custom = losses.from_callable(as_scalar(fn, hyper, torch.sum))
    assert_weights(custom.weights(**data), known.weights(**data))
    constant = known.lambda_w + known.lambda_l if fn is kto else 0.0
    torch.testing.assert_close(custom.value(**data), known.value(**data) + constant, rtol=1e-10, atol=1e-12)
    count = len(data["chosen_logp"])
    mean = losses.from_callable(as_scalar(fn, hyper, torch.mean)).weights(**data)
    assert_weights(tuple(weight * count for weight in mean), known.weights(**data))


def test_from_callable_passes_only_what_is_taken():
    data = pairs("ordinary")
    only = losses.from_callable(lambda chosen_logp: -chosen_logp.sum())
    assert (only.needs_reference, only.needs_lengths) == (False, False)
    d_w, d_l = only.weights(**data)
    assert (d_w == 1).all()
    assert (d_l == 0).all()

    seen = {}

    def everything(**arguments):
        seen.update(arguments)
        return arguments["chosen_logp"].sum()

    losses.from_callable(everything).weights(chosen_logp=data["chosen_logp"], rejected_logp=data["rejected_logp"])
    assert list(seen) == ["chosen_logp", "rejected_logp"]
    losses.from_callable(everything).weights(**data)
    assert list(seen) == list(data)

    def optional(chosen_logp, chosen_len=None, scale=2.0):
        return scale * (chosen_logp if chosen_len is None else chosen_logp / chosen_len).sum()

    loss = losses.from_callable(optional)
    assert loss.name == "optional"
    assert not loss.needs_lengths
    logps = {key: data[key] for key in ("chosen_logp", "rejected_logp")}
    assert (loss.weights(**logps)[0] == -2).all()
    torch.testing.assert_close(loss.weights(**data)[0], -2 / data["chosen_len"].to(F64))

    def needy(rejected_logp, ref_rejected_logp, rejected_len):
        return ((rejected_logp - ref_rejected_logp) / rejected_len).sum()

    loss = losses.from_callable(needy)
    assert loss.needs_reference
    assert loss.needs_lengths
    with pytest.raises(InputError, match="missing ref_rejected_logp, rejected_len"):
        loss.weights(**logps)


def test_from_callable_coupled_batch():
    data = pairs("ordinary")
    weights = losses.from_callable(lambda chosen_logp: torch.logsumexp(chosen_logp, 0)).weights(**data)
    torch.testing.assert_close(weights[0], -torch.softmax(data["chosen_logp"], 0))


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (3, "received 3"),
        (lambda policy_logp: policy_logp.sum(), "requires 'policy_logp'"),
        (lambda beta=0.1: torch.tensor(beta), "takes neither"),
        (lambda chosen_logp, /: chosen_logp.sum(), "requires 'chosen_logp'"),
    ],
)
def test_from_callable_refuses_functions(fn, said):
    with pytest.raises(InputError, match=said):
        losses.from_callable(fn)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda chosen_logp: chosen_logp, r"shape \[400\]"),
        (lambda chosen_logp: 1.0, "float"),
        (lambda chosen_logp: (chosen_logp > 0).sum(), "int64"),
        (lambda chosen_logp: chosen_logp.detach().sum(), "differentiated"),
    ],
)
def test_from_callable_refuses_results(fn, said):
    with pytest.raises(InputError, match=said):
        losses.from_callable(fn).weights(**pairs("ordinary"))


def test_from_callable_names_non_finite_weights():
    data = pairs("ordinary") | {"rejected_logp": pairs("ordinary")["chosen_logp"].clone()}
    data["rejected_logp"][1:] -= 1.0
    with pytest.raises(NonFiniteError, match="d_w is nan or inf for pair 0"):
        losses.from_callable(lambda chosen_logp, rejected_logp: (chosen_logp - rejected_logp).sqrt().sum()).weights(
            **data
        )
