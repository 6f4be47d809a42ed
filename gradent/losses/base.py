"""What every loss shares: the `Loss` interface, the reading of its arguments, the check of its hyperparameters.

Letters, as in the formulas of the subclasses, all float64 `[B]` for B pairs: `s_w`, `s_l` the log-probs of chosen and
rejected under the policy (sums over completion tokens, nats), `r_w`, `r_l` the same under the reference, `n_w`, `n_l`
the completions' lengths in tokens, `Δ = (s_w - r_w) - (s_l - r_l)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradent.errors import InputError, NonFiniteError

__all__ = ["ARGUMENTS", "LENGTHS", "NORMS", "REFERENCE", "Loss", "PairTerms", "describe_pairs"]

LOGPS = ("chosen_logp", "rejected_logp")
REFERENCE = ("ref_chosen_logp", "ref_rejected_logp")
LENGTHS = ("chosen_len", "rejected_len")
ARGUMENTS = LOGPS + REFERENCE + LENGTHS
"""The keyword arguments of `Loss.weights` and `Loss.value`."""
NORMS = ("chosen_norm", "rejected_norm")
"""Further ones of `Loss.weights`, for a loss that `needs_norms`."""

Rule = tuple[Callable[[float], bool], str]
POSITIVE: Rule = (lambda value: value > 0, "a finite number > 0")
NOT_NEGATIVE: Rule = (lambda value: value >= 0, "a finite number >= 0")
ANY_NUMBER: Rule = (lambda value: True, "any finite number")

HYPERPARAMETERS: dict[str, Rule] = {
    **dict.fromkeys(("beta", "C"), POSITIVE),
    **dict.fromkeys(("lam", "gamma", "delta", "lambda_w", "lambda_l"), NOT_NEGATIVE),
    **dict.fromkeys(("alpha", "z_ref"), ANY_NUMBER),
}
"""What each numeric hyperparameter may be. The two switches (bool) are not listed: they are True or False."""


class _Argument:
    """An argument of a loss, as an attribute of `PairTerms`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, terms: PairTerms, owner: type) -> Tensor:
        return terms.given[self._name]


@dataclass(frozen=True)
class PairTerms:
    """The arguments of a loss after checking, under the letters of the formulas."""

    given: Mapping[str, Tensor]  # {argument: float64 [B]}; what the loss does not use may be missing

    s_w, s_l = _Argument("chosen_logp"), _Argument("rejected_logp")
    r_w, r_l = _Argument("ref_chosen_logp"), _Argument("ref_rejected_logp")
    n_w, n_l = _Argument("chosen_len"), _Argument("rejected_len")

    @property
    def margin(self) -> Tensor:
        """`Δ`, the margin against the reference."""
        return (self.s_w - self.r_w) - (self.s_l - self.r_l)

    @property
    def mean_margin(self) -> Tensor:
        """`s_w/n_w - s_l/n_l`, the margin of log-probs averaged over tokens."""
        return self.s_w / self.n_w - self.s_l / self.n_l


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A preference loss `ℓ` of B pairs and its weights, `-∇ℓ = d_w ∇log π(y_w|x) - d_l ∇log π(y_l|x)`.

    The loss of a pair, not a batch mean: a trainer that averages B pairs takes steps 1/B as long. Source: the
    paper's Section 3.2, equations (6) to (8).

    Attributes:
        name: the name that `losses.get` knows it by.
    """

    name: str = field(init=False)
    _arguments: ClassVar[tuple[str, ...]] = ()  # what `_uses` gives where it is the same for all hyperparameters

    def __post_init__(self) -> None:
        for hyper in fields(self):
            value = getattr(self, hyper.name)
            if hyper.name in HYPERPARAMETERS:
                _check_number(self.name, hyper.name, value)
            elif isinstance(hyper.default, bool) and not isinstance(value, bool):
                raise InputError(f"{self.name}: {hyper.name} is {value!r}; accepted: True or False.")

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_chosen_logp` and `ref_rejected_logp` are required."""
        return any(argument in REFERENCE for argument in self._uses())

    @property
    def needs_lengths(self) -> bool:
        """Whether `chosen_len` and `rejected_len` are required."""
        return any(argument in LENGTHS for argument in self._uses())

    @property
    def needs_norms(self) -> bool:
        """Whether `weights` requires `chosen_norm` and `rejected_norm`: a rule for steps, as Section 5.1's, does."""
        return False

    def weights(
        self,
        *,
        chosen_logp: Tensor,
        rejected_logp: Tensor,
        ref_chosen_logp: Tensor | None = None,
        ref_rejected_logp: Tensor | None = None,
        chosen_len: Tensor | None = None,
        rejected_len: Tensor | None = None,
        chosen_norm: Tensor | None = None,
        rejected_norm: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`d_w = -∂ℓ/∂log π(y_w|x)` and `d_l = +∂ℓ/∂log π(y_l|x)` of each pair, from closed forms.

        Args:
            chosen_logp: `log π(y_w|x)`, summed over completion tokens, nats, `[B]`.
            rejected_logp: `log π(y_l|x)`, likewise, `[B]`.
            ref_chosen_logp: the reference's `log π_ref(y_w|x)`, `[B]`; ignored by losses without a reference.
            ref_rejected_logp: the reference's `log π_ref(y_l|x)`, `[B]`; ignored likewise.
            chosen_len: completion tokens of chosen, at least 1, `[B]`; ignored by losses that use no length.
            rejected_len: completion tokens of rejected, `[B]`; ignored likewise.
            chosen_norm: `‖∇log π(y_w|x)‖`, `[B]`; ignored by losses whose `needs_norms` is False.
            rejected_norm: `‖∇log π(y_l|x)‖`, `[B]`; ignored likewise.

        Returns:
            `(d_w, d_l)`, float64 `[B]`, without gradient history, on the device of `chosen_logp`.

        Raises:
            InputError: an argument that the loss uses is missing, is not of shape `[B]`, or a length is under 1.
            NonFiniteError: a nan or an inf in an argument that the loss uses, or in a weight.
        """
        arguments = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, chosen_len, rejected_len)
        named = dict(zip(ARGUMENTS + NORMS, (*arguments, chosen_norm, rejected_norm), strict=True))
        terms = self._read(named, also=NORMS if self.needs_norms else ())
        with torch.no_grad():
            d_w, d_l = self._weights(terms)
        for which, values in (("d_w", d_w), ("d_l", d_l)):
            _check_finite(self.name, which, values)
        return d_w, d_l

    def value(
        self,
        *,
        chosen_logp: Tensor,
        rejected_logp: Tensor,
        ref_chosen_logp: Tensor | None = None,
        ref_rejected_logp: Tensor | None = None,
        chosen_len: Tensor | None = None,
        rejected_len: Tensor | None = None,
    ) -> Tensor:
        """The loss `ℓ` of each pair; differentiable in the log-probs.

        Args:
            chosen_logp: as in `weights`, `[B]`.
            rejected_logp: as in `weights`, `[B]`.
            ref_chosen_logp: as in `weights`, `[B]`.
            ref_rejected_logp: as in `weights`, `[B]`.
            chosen_len: as in `weights`, `[B]`.
            rejected_len: as in `weights`, `[B]`.

        Returns:
            `ℓ`, float64 `[B]`.

        Raises:
            InputError: as `weights`.
            NonFiniteError: a nan or an inf in an argument that the loss uses.
        """
        arguments = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, chosen_len, rejected_len)
        return self._value(self._read(dict(zip(ARGUMENTS, arguments, strict=True))))

    def _uses(self) -> Sequence[str]:
        """The arguments, beyond the two log-probs, without which this loss cannot be computed."""
        return self._arguments

    def _reads(self) -> Sequence[str]:
        """The arguments that are checked and handed on; the others are ignored."""
        return (*LOGPS, *self._uses())

    @abstractmethod
    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _value(self, terms: PairTerms) -> Tensor: ...

    def _read(self, given: Mapping[str, Any], also: Sequence[str] = ()) -> PairTerms:
        required = (*LOGPS, *self._uses(), *also)
        missing = [argument for argument in required if given[argument] is None]
        if missing:
            norms = (
                ", *_norm the lengths of their gradients: the roots of a gram's chosen_sq, rejected_sq" if also else ""
            )
            raise InputError(
                f"{self.name}: missing {', '.join(missing)}. This loss needs {', '.join(required)}, each of shape [B] "
                "(ref_* are the log-probs of the same completions under the reference model, *_len their tokens"
                f"{norms})."
            )
        terms: dict[str, Tensor] = {}
        for argument in self._reads():
            if given.get(argument) is not None:
                terms[argument] = self._read_one(argument, given[argument], terms.get("chosen_logp"))
        return PairTerms(terms)

    def _read_one(self, argument: str, values: Any, first: Tensor | None) -> Tensor:
        try:
            tensor = torch.as_tensor(values, device=None if first is None else first.device).to(torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.name}: {argument} is a {type(values).__name__} that is no tensor of numbers ({error}); "
                "accepted is one number a pair, shape [B]."
            ) from error
        expected = "[B]" if first is None else str(list(first.shape))
        if tensor.ndim != 1 or (first is not None and tensor.shape != first.shape):
            raise InputError(
                f"{self.name}: {argument} has shape {list(tensor.shape)}; accepted is {expected}, one number a pair, "
                "as chosen_logp has."
            )
        _check_finite(self.name, argument, tensor)
        if argument in LENGTHS and bool((tensor < 1).any()):
            raise InputError(
                f"{self.name}: {argument} is under 1 for {describe_pairs(tensor < 1)}; a completion has at least one "
                "token."
            )
        if argument in NORMS and bool((tensor < 0).any()):
            raise InputError(f"{self.name}: {argument} is below 0 for {describe_pairs(tensor < 0)}; it is a norm.")
        return tensor


def describe_pairs(bad: Tensor, limit: int = 8) -> str:
    """The marked pairs, bool `[B]`, for an error message: "pair 3", "pairs 3, 5", "pairs 0, 1, ... (12 in all)"."""
    numbers = bad.nonzero().flatten().tolist()
    if len(numbers) == 1:
        return f"pair {numbers[0]}"
    text = "pairs " + ", ".join(map(str, numbers[:limit]))
    return text if len(numbers) <= limit else f"{text}, ... ({len(numbers)} in all)"


def _check_finite(name: str, what: str, values: Tensor) -> None:
    bad = ~values.detach().isfinite()
    if bool(bad.any()):
        check = "Check those pairs' log-probs: a nan usually comes from the model's logits, -inf from a token of "
        check += "probability zero."
        if what in NORMS:
            check = f"Check {what.removesuffix('_norm')}_sq of the gram: a nan usually comes from the model's logits."
        raise NonFiniteError(f"{name}: {what} is nan or inf for {describe_pairs(bad)}. {check}")


def _check_number(name: str, parameter: str, value: object) -> None:
    accepts, accepted = HYPERPARAMETERS[parameter]
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not math.isfinite(number) or not accepts(number):
        raise InputError(f"{name}: {parameter} is {value!r}; accepted: {accepted}.")
