"""Table 2 as formulas that run: is a row, put into equation (6), the loss that it names? And Section 3.2.1's ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from examples.paper.claims import Claim, judge_share
from examples.paper.draw import write_rows
from examples.paper.lab import Lab, Outcome
from examples.paper.registry import NAMES
from gradent import losses

__all__ = ["PRINTED", "Letters", "Printed", "draw_letters", "printed_weights", "table2"]


@dataclass(frozen=True)
class Letters:
    """Numbers of N pairs, float64 `[N]`, in the letters of Table 2."""

    c_w: Tensor
    c_l: Tensor
    n_w: Tensor
    n_l: Tensor

    @property
    def c(self) -> Tensor:
        """`c_ref`."""
        return self.c_w - self.c_l


Function = Callable[[Tensor, Letters], Tensor]


@dataclass(frozen=True)
class Printed:
    """A row of Table 2 as printed: `ℓ = -(m(h_w(s_w) - h_l(s_l)) + Λ(s_w))`.

    Attributes:
        m: outer function.
        h_w: of chosen.
        h_l: of rejected.
        regularizer: Λ.
        named: the loss that it is to be.
        why: what differs, where something does.
    """

    m: Function
    h_w: Function
    h_l: Function
    named: losses.Loss
    regularizer: Function = lambda a, _: 0 * a
    why: str = ""


BETA, ALPHA, GAMMA, DELTA, LAM, LAM_DPOP = 0.1, 0.2, 0.5, 1.0, 1.0, 50.0


def _scaled(a: Tensor, _: Letters) -> Tensor:
    return BETA * a


def _same(a: Tensor, _: Letters) -> Tensor:
    return a


def _likelihood(a: Tensor, _: Letters) -> Tensor:
    return LAM * a


PRINTED: dict[str, Printed] = {
    "dpo": Printed(lambda a, k: logsigmoid(a - k.c), _scaled, _scaled, losses.get("dpo"), why="`c_ref` lacks β"),
    "rdpo": Printed(
        lambda a, k: logsigmoid(a - (k.c + ALPHA * (k.n_w - k.n_l))), _scaled, _scaled, losses.get("rdpo"),
        why="`c_ref` lacks β, and the length term has the other sign",
    ),
    "simpo": Printed(
        lambda a, _: logsigmoid(a - GAMMA), lambda a, k: BETA * a / k.n_w, lambda a, k: BETA * a / k.n_l,
        losses.get("simpo"),
    ),
    "ipo": Printed(
        lambda a, k: (a - (k.c + 1 / (2 * BETA))) ** 2, _same, _same, losses.get("ipo"),
        why="`m` lacks the minus sign of (6)",
    ),
    "rrhf": Printed(
        lambda a, _: a.clamp_max(0), lambda a, k: a / k.n_w, lambda a, k: a / k.n_l, losses.get("rrhf"), _likelihood
    ),
    "slic": Printed(lambda a, _: (a - DELTA).clamp_max(0), _same, _same, losses.get("slic"), _likelihood),
    "cpo": Printed(lambda a, _: logsigmoid(a), _scaled, _scaled, losses.get("cpo"), _likelihood),
    "dpop": Printed(
        lambda a, k: logsigmoid(a - k.c), lambda a, k: BETA * a - LAM_DPOP * (k.c_w - a).clamp_min(0), _scaled,
        losses.get("dpop"), why="`c_ref` lacks β, and λ stands outside it (`log c_ref^w` read as `c_ref^w`)",
    ),
    "kto": Printed(
        _same, lambda a, k: torch.sigmoid(BETA * a - k.c_w), lambda a, k: torch.sigmoid(k.c_l - a), losses.get("kto"),
        why="`h_l` lacks a minus sign and β, `c_ref` lacks β (`log c_ref` read as `c_ref`)",
    ),
    "sppo": Printed(
        _same, lambda a, _: (a - 1 / BETA) ** 2, lambda a, _: (a + 1 / BETA) ** 2,
        losses.get("sppo", reference_free=True), why="`h_w` lacks a minus sign",
    ),
}  # fmt: skip
"""Loss to its row, with β of all, α, γ, δ and λ of Appendix C, and KTO's weights 1 and z 0."""


def printed_weights(row: Printed, s_w: Tensor, s_l: Tensor, letters: Letters) -> tuple[Tensor, Tensor]:
    """`d_w` and `d_l` of a row of Table 2 by autograd.

    Args:
        row: the row.
        s_w: chosen's log-probs, `[N]`.
        s_l: rejected's, `[N]`.
        letters: the rest.

    Returns:
        `(d_w, d_l)`, `[N]`.
    """
    s_w, s_l = s_w.clone().requires_grad_(), s_l.clone().requires_grad_()
    inner = row.h_w(s_w, letters) - row.h_l(s_l, letters)
    value = -(row.m(inner, letters) + row.regularizer(s_w, letters))
    d_w, d_l = torch.autograd.grad(value.sum(), (s_w, s_l))
    return -d_w, d_l


def draw_letters(count: int = 512) -> tuple[Tensor, Tensor, Letters]:
    """Random pairs.

    Args:
        count: N.

    Returns:
        `(s_w, s_l, letters)`, float64 `[N]`.
    """
    draw = torch.Generator().manual_seed(0)
    s_w, s_l, c_w, c_l = (-9 * torch.rand(count, generator=draw, dtype=torch.float64) for _ in range(4))
    n_w, n_l = (torch.randint(1, 9, (count,), generator=draw).double() for _ in range(2))
    return s_w, s_l, Letters(c_w, c_l, n_w, n_l)


def table2(lab: Lab) -> Outcome:
    """Table 2 as formulas that run: is a row, put into (6), the loss that it names?

    Args:
        lab: where to.

    Returns:
        What was found.
    """
    s_w, s_l, letters = draw_letters()
    given = {
        "chosen_logp": s_w, "rejected_logp": s_l, "ref_chosen_logp": letters.c_w, "ref_rejected_logp": letters.c_l,
        "chosen_len": letters.n_w, "rejected_len": letters.n_l,
    }  # fmt: skip
    rows, claims = [], []
    for name, row in PRINTED.items():
        d_w, d_l = row.named.weights(**given)
        errors = [
            (ours - theirs).abs() / ours.abs().clamp_min(1e-300)
            for ours, theirs in zip((d_w, d_l), printed_weights(row, s_w, s_l, letters), strict=True)
        ]
        right = sum((one.maximum(other) < 1e-9).sum().item() for one, other in [errors])
        claims.append(
            judge_share(
                "Table 2", f"{NAMES[name]}: the printed row, put into (6), is the loss{_because(row)}", paper="is",
                what="random pairs at which autograd of the printed row gives the loss's d_w and d_l", good=int(right),
                of=len(s_w),
            )
        )  # fmt: skip
        rows.append({"loss": NAMES[name], "agree": int(right), "of": len(s_w), "printed differs": row.why,
                     "mean d_w": d_w.mean().item(), "mean d_l": d_l.mean().item(),
                     "share d_w > d_l": (d_w > d_l).double().mean().item()})  # fmt: skip
    write_rows(lab.table("table2"), rows)
    return Outcome(
        "table2",
        [*claims, *_ratios(given)],
        notes=[
            "`gradent.losses` has the rows with these corrections; its tests hold them against the losses' original "
            "forms and against TRL's trainers."
        ],
    )


def _because(row: Printed) -> str:
    return f" ({row.why})" if row.why else ""


def _ratios(given: dict[str, Tensor]) -> list[Claim]:
    """Section 3.2.1: which of the two weights is larger."""
    where = "Section 3.2.1"
    weights = {name: losses.get(name).weights(**given) for name in ("dpo", "cpo", "dpop", "rrhf", "slic", "simpo")}
    # Reference-free, d_l is positive where 1/β + log π(y_l|x) is (the paper's A.2): wider draws, of which those count.
    wide = {name: 3 * given[name] for name in ("chosen_logp", "rejected_logp")}
    sppo = losses.get("sppo", beta=BETA, reference_free=True).weights(**wide)
    meets = 1 / BETA + wide["rejected_logp"] > 0
    lengths = given["rejected_len"] / given["chosen_len"]
    ratios = {name: d_w / d_l for name, (d_w, d_l) in weights.items()}

    def count_of(name: str, claim: str, paper: str, what: str, good: Tensor) -> Claim:
        return judge_share(
            where, f"{name}: {claim}", paper=paper, what=f"random pairs with {what}", good=int(good.sum()),
            of=len(good),
        )  # fmt: skip

    claims = [
        count_of("DPO", "both weights are equal", "d_w/d_l = 1", "d_w/d_l = 1", (ratios["dpo"] - 1).abs() < 1e-12),
        count_of(
            "SimPO", "the weights' ratio is that of the lengths", "d_w/d_l = n_l/n_w", "that ratio",
            (ratios["simpo"] / lengths - 1).abs() < 1e-9,
        ),
        count_of(
            "SPPO", f"chosen has the larger weight where 1/β + log π(y_l|x) > 0 ({int(meets.sum())} of {len(meets)} "
            "drawn), and only there are both positive", "d_w/d_l > 1", "d_w > d_l, and d_l > 0 just where that holds",
            (sppo[0] > sppo[1]) & ((sppo[1] > 0) == meets),
        ),
    ]  # fmt: skip
    for name in ("cpo", "rrhf", "slic", "dpop"):
        bare_w, bare_l = losses.get(name, lam=0.0).weights(**given)
        # Where a hinge is satisfied nothing but the regularizer is left, and there is no ratio to enlarge.
        counted = bare_l > 0
        where_so = " (pairs whose hinge contrasts)" if name in ("rrhf", "slic") else ""
        if name == "dpop":
            counted, where_so = given["chosen_logp"] < given["ref_chosen_logp"], " (chosen below the reference)"
        larger = (ratios[name] > bare_w / bare_l)[counted]
        claims.append(
            count_of(
                NAMES[name], f"the regularizer makes d_w/d_l larger{where_so}", "larger",
                "d_w/d_l above that at λ = 0", larger,
            )
        )  # fmt: skip
    return claims
