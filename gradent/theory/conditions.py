"""Will chosen rise, will rejected fall? The paper's Conditions 1 and 2 and Table 1, on measured Gram entries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradent.errors import InputError, NonFiniteError
from gradent.losses import Loss
from gradent.losses.base import describe_pairs
from gradent.pair_gram import PairGram

__all__ = ["CASES", "Verdict", "case_numbers", "verdict"]

CASES: dict[int, str] = {0: "inactive", 1: "ideal", 2: "both_down", 3: "both_up", 4: "reversed"}
"""Number to name of each case; 1 to 3 are the paper's Table 1."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one gradient step on a pair's own loss does to its two log-probs, to first order.

    The step is `θ ← θ - η ∇ℓ`, plain gradient descent on that pair alone (with `measure(metric=...)`, in that metric);
    changes are nats per unit of η, so η times them is the change of one small step. All tensors live on the CPU.
    Source: the paper's Section 3.2, Condition 2 and Table 1, with the signs of equations (4) and (5).

    Attributes:
        d_w: weight of `∇log π(y_w|x)` in `-∇ℓ`, float64 `[B]`; the mean over the response's tokens where the loss
            weighs them differently, for display: the changes take each token's own.
        d_l: weight of `-∇log π(y_l|x)` in `-∇ℓ`, float64 `[B]`; a mean as `d_w`.
        chosen_change: `d_w‖g_w‖² - d_l⟨g_w,g_l⟩`, float64 `[B]`; `-⟨g_w,∇ℓ⟩` where the loss weighs tokens differently.
        rejected_change: `d_w⟨g_w,g_l⟩ - d_l‖g_l‖²`, float64 `[B]`; `-⟨g_l,∇ℓ⟩` in the same way.
        case: int64 `[B]`. 1 ideal: chosen rises, rejected falls. 2 both down. 3 both up. 4 reversed: chosen falls,
            rejected rises. 0 inactive: `d_w == d_l == 0`, so the loss moves nothing (a satisfied hinge, a sigmoid
            that has underflowed); no case of Table 1 is claimed. A change of exactly zero counts as the wanted one
            (chosen rises if its change is >= 0, rejected falls if its change is <= 0), as in Condition 2, so where
            Table 1's cases overlap the better one is taken.
        gram: the measured entries that the verdict is about.
        has_token_weights: whether the loss weighs the tokens of a response differently (ORPO, `ld_alpha`, token masks).
    """

    d_w: Tensor
    d_l: Tensor
    chosen_change: Tensor
    rejected_change: Tensor
    case: Tensor
    gram: PairGram = field(repr=False)
    has_token_weights: bool = False

    @classmethod
    def from_weights(cls, gram: PairGram, d_w: Tensor, d_l: Tensor) -> Verdict:
        """The verdict for weights that are known already, such as those read off a trainer's own backward.

        Args:
            gram: the Gram entries of B pairs.
            d_w: weight of chosen, `[B]`.
            d_l: weight of rejected, `[B]`.

        Returns:
            The verdict, on the CPU.

        Raises:
            InputError: a weight is not of shape `[B]`.
            NonFiniteError: a Gram entry or a weight is nan or inf; the message names the pairs.
        """
        entries, (d_w, d_l) = _entries(gram), _checked(gram, d_w=d_w, d_l=d_l)
        chosen_change = d_w * entries["chosen_sq"] - d_l * entries["inner"]
        rejected_change = d_w * entries["inner"] - d_l * entries["rejected_sq"]
        return cls(
            d_w=d_w,
            d_l=d_l,
            chosen_change=chosen_change,
            rejected_change=rejected_change,
            case=case_numbers(d_w, d_l, chosen_change >= 0, rejected_change <= 0),
            gram=gram,
        )

    @classmethod
    def from_changes(
        cls, gram: PairGram, d_w: Tensor, d_l: Tensor, chosen_change: Tensor, rejected_change: Tensor
    ) -> Verdict:
        """The verdict for a loss that weighs the tokens of a response differently, from changes that were measured.

        Args:
            gram: the Gram entries of B pairs.
            d_w: mean weight of chosen's tokens, `[B]`; for display alone.
            d_l: mean weight of rejected's tokens, `[B]`; the same.
            chosen_change: `-⟨g_w,∇ℓ⟩`, `[B]`, in nats per unit of learning rate.
            rejected_change: `-⟨g_l,∇ℓ⟩`, `[B]`, the same.

        Returns:
            The verdict, on the CPU, whose cases are those of the changes. A pair is inactive where both weights and
            both changes are zero.

        Raises:
            InputError: a weight or change is not of shape `[B]`.
            NonFiniteError: a Gram entry, a weight or a change is nan or inf; the message names the pairs.
        """
        d_w, d_l, chosen_change, rejected_change = _checked(
            gram, d_w=d_w, d_l=d_l, chosen_change=chosen_change, rejected_change=rejected_change
        )
        case = case_numbers(d_w, d_l, chosen_change >= 0, rejected_change <= 0)
        moves = (chosen_change != 0) | (rejected_change != 0)
        ones = torch.ones_like(d_w)
        return cls(
            d_w=d_w,
            d_l=d_l,
            chosen_change=chosen_change,
            rejected_change=rejected_change,
            case=torch.where(moves, case_numbers(ones, ones, chosen_change >= 0, rejected_change <= 0), case),
            gram=gram,
            has_token_weights=True,
        )

    @property
    def weight_ratio(self) -> Tensor:
        """`d_w / d_l`, float64 `[B]`; inf where only `d_l` is zero, nan where the pair is inactive."""
        return self.d_w / self.d_l

    @property
    def chosen_needs(self) -> Tensor:
        """The smallest `d_w / d_l` at which chosen rises, `⟨g_w,g_l⟩ / ‖g_w‖²`, float64 `[B]`: condition (9).

        A statement about losses with `d_w >= 0` and `d_l > 0`: dividing by a negative weight turns the condition
        round, as IPO's and SPPO's weights can (`case` is right there too). -inf where `g_w` is zero: nothing moves.
        nan with `has_token_weights`: no ratio of two numbers decides there.
        """
        if self.has_token_weights:
            return torch.full_like(self.d_w, torch.nan)
        return torch.where(self.gram.chosen_sq > 0, self.gram.inner / self.gram.chosen_sq, -torch.inf)

    @property
    def rejected_needs(self) -> Tensor:
        """The largest `d_w / d_l` at which rejected falls, `‖g_l‖² / ⟨g_w,g_l⟩`, float64 `[B]`: condition (10).

        inf where the inner product is not positive: then rejected falls at any ratio of non-negative weights. Stated
        for weights as in `chosen_needs`, and nan as there.
        """
        if self.has_token_weights:
            return torch.full_like(self.d_w, torch.nan)
        return torch.where(self.gram.inner > 0, self.gram.rejected_sq / self.gram.inner, torch.inf)

    def fractions(self) -> dict[str, float]:
        """The share of the B pairs in each case.

        Returns:
            `{"ideal", "both_down", "both_up", "reversed", "inactive"}` to shares that sum to 1; all 0 without a pair.
        """
        count = max(1, len(self.case))
        return {CASES[number]: (self.case == number).sum().item() / count for number in (1, 2, 3, 4, 0)}


def verdict(
    gram: PairGram, loss: Loss, ref_chosen_logp: Tensor | None = None, ref_rejected_logp: Tensor | None = None
) -> Verdict:
    """Predicts, for each pair, whether a small step on `loss` raises chosen and lowers rejected.

    Args:
        gram: what `measure` returned for B pairs.
        loss: from `losses.get` or `losses.from_callable`. Its weights are taken at the gram's log-probs and lengths.
        ref_chosen_logp: the reference's log-prob of each chosen completion, nats, `[B]`; required by losses whose
            `needs_reference` is True, ignored by the others.
        ref_rejected_logp: the same for rejected, `[B]`.

    Returns:
        The `Verdict` of B pairs.

    Raises:
        InputError: `loss` is not a `Loss`, a reference log-prob that it needs is missing, or a shape is not `[B]`.
        NonFiniteError: a Gram entry, log-prob or weight is nan or inf; the message names the pairs.

    Example:
        >>> v = verdict(gram, losses.get("dpo", beta=0.1), ref_chosen_logp, ref_rejected_logp)  # doctest: +SKIP
        >>> v.fractions()  # doctest: +SKIP
        {'ideal': 0.25, 'both_down': 0.625, 'both_up': 0.125, 'reversed': 0.0, 'inactive': 0.0}
    """
    if not isinstance(loss, Loss):
        raise InputError(
            f"verdict: loss is {loss!r}, a {type(loss).__name__}; accepted is a Loss: losses.get('dpo', beta=0.1), or "
            "losses.from_callable(fn)."
        )
    norms = {f"{side}_norm": _norm(getattr(gram, f"{side}_sq")) for side in ("chosen", "rejected") if loss.needs_norms}
    d_w, d_l = loss.weights(
        chosen_logp=gram.chosen_logp,
        rejected_logp=gram.rejected_logp,
        ref_chosen_logp=ref_chosen_logp,
        ref_rejected_logp=ref_rejected_logp,
        chosen_len=gram.chosen_len,
        rejected_len=gram.rejected_len,
        **norms,
    )
    result = Verdict.from_weights(gram, d_w, d_l)
    return _balanced(result) if loss.needs_norms else result


def _checked(gram: PairGram, **values: Tensor) -> list[Tensor]:
    """Numbers of B pairs, float64 `[B]` on the CPU; an error where a shape differs or something is not finite."""
    found: dict[str, Tensor] = {}
    for name, given in values.items():
        if given.shape != gram.inner.shape:
            raise InputError(
                f"verdict: {name} has shape {list(given.shape)} but the gram holds {len(gram)} pairs; accepted "
                f"is [{len(gram)}], one {'weight' if name.startswith('d_') else 'change'} a pair."
            )
        found[name] = given.detach().to("cpu", torch.float64)
    for name, given in (_entries(gram) | found).items():
        bad = ~given.isfinite()
        if bool(bad.any()):
            raise NonFiniteError(
                f"verdict: {name} is nan or inf for {describe_pairs(bad)}. Leave those pairs out, or find the "
                "cause: measure in float32 or wider, and check the model's logits on them."
            )
    return list(found.values())


def _entries(gram: PairGram) -> dict[str, Tensor]:
    """The gram's entries by name, float64 `[B]`, on the CPU."""
    return {name: getattr(gram, name).to("cpu", torch.float64) for name in ("chosen_sq", "rejected_sq", "inner")}


def _norm(square: Tensor) -> Tensor:
    """The root; a square that rounding has left below 0 is one of 0."""
    return square.double().clamp_min(0).sqrt()


def _balanced(result: Verdict) -> Verdict:
    """The verdict for weights that bring both gradients to one length, with signs that rounding cannot turn."""
    # With d_w‖g_w‖ = d_l‖g_l‖, chosen changes by d_w‖g_w‖²(1 - cos) and rejected by -d_l‖g_l‖²(1 - cos). A measured
    # cosine beyond 1 by rounding counts as 1, and that of a zero gradient as 0.
    chosen_sq, rejected_sq, inner = _entries(result.gram).values()
    scale = _norm(chosen_sq) * _norm(rejected_sq)
    gap = 1 - torch.where(scale > 0, inner / scale, 0.0).clamp(-1, 1)
    chosen_change, rejected_change = result.d_w * chosen_sq * gap, -result.d_l * rejected_sq * gap
    return replace(
        result,
        chosen_change=chosen_change,
        rejected_change=rejected_change,
        case=case_numbers(result.d_w, result.d_l, chosen_change >= 0, rejected_change <= 0),
    )


def case_numbers(d_w: Tensor, d_l: Tensor, rises: Tensor, falls: Tensor) -> Tensor:
    """`Verdict.case` of each pair, int64 `[B]`, from the weights and whether chosen rises and rejected falls, `[B]`."""
    # 1 = both as wanted; chosen failing adds 1, rejected failing adds 2: 2 both down, 3 both up, 4 reversed.
    case = 1 + (~rises).long() + 2 * (~falls).long()
    return torch.where((d_w == 0) & (d_l == 0), 0, case)
