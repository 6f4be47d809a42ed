"""What one backward of a trainer showed of its rows.

Letters: N rows; of k pairs, rows 0..k-1 are chosen and k..2k-1 rejected; T tokens of a row, padding left out; M
entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradent.hooks.piggyback.gradient_norms import GradientNorms
from gradent.hooks.piggyback.packed import PackedCall
from gradent.kernels.common.wanted import Wanted
from gradent.model.weight_mark import WeightMark

__all__ = ["BackwardObservation", "mark_completions"]


def _no_rows() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass(eq=False)
class BackwardObservation:
    """One backward of the trainer, with the forwards below it; everything is on the CPU."""

    sides: int = 2  # 2 of pairs, 1 of rows that are no pairs
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of each row, ids int64 and marks bool
    group: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # labels of their groups `[N]`
    tokens: list[Tensor] = field(default_factory=list)  # coefficient of each of their tokens, float64 `[T]`
    c: Tensor = field(default_factory=_no_rows)  # `∂L/∂log π(y|x)` of those rows, float64 `[N]`
    logps: Tensor = field(default_factory=_no_rows)  # their log-probs (a reward model's rewards), float64 `[N]`
    is_constant: bool = True  # a row's tokens share one coefficient
    is_of_tokens: bool = True  # or have one each, and nothing else reaches the log-probs' logits
    has_given_marks: bool = True  # the marks came with the batch
    is_reward: bool = False  # the model is a reward model
    is_half: bool = False  # output gradients are float16
    further: tuple[str, ...] = ()  # inputs beside the tokens, which a pass of gradent's own cannot give
    unpaired: int = 0  # rows that found no partner
    wanted: Wanted = field(default_factory=lambda: Wanted.pairs(0))  # the products that entries are
    # Parameter number -> `[M]` float64, complete if `no_entries_reason` is None.
    entries: dict[int, Tensor] = field(default_factory=dict)
    # Of the step's account: parameter number -> blocks of an `AccountLayout`, and the sources of its directions.
    account: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    weighted: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    rows_kept: dict[int, Tensor] = field(default_factory=dict)  # or parameter number -> `g_i`, `[N, *shape]`
    sketches: Tensor | None = None  # or float32 `[N, K]`, sketches of `√(r P) ∘ g_i`
    rates: Tensor = field(default_factory=_no_rows)  # with r of each parameter, float64 `[P]`
    seed: int = 0  # of the sketches
    packed_call: PackedCall | None = None  # the forward, where the model got these rows packed
    no_account_reason: str | None = None  # why there is no account
    norms: GradientNorms | None = None  # of the gradients when this backward ended
    shared: int = 0  # parameters whose gradient the trainer's backward took from the measurement
    weights: WeightMark | None = None  # a look at the weights before its first forward; None for sharded ones
    no_entries_reason: str | None = None  # why there are no entries
    unusable_reason: str | None = None  # why not even the coefficients can be used

    @property
    def pairs(self) -> int:
        """k."""
        return len(self.c) // 2

    def side(self, number: int) -> slice:
        """The rows of one side."""
        size = len(self.c) // self.sides
        return slice(number * size, (number + 1) * size)

    def pair_entries(self) -> dict[int, Tensor]:
        """Parameter number -> `[k, 3]`: `(‖G_w‖², ‖G_l‖², ⟨G_w, G_l⟩)` of each pair."""
        if len(self.wanted.groups) != 1 or self.pairs == 1:
            return {number: entry.view(-1, 3) for number, entry in self.entries.items()}
        return {number: _of_pairs(self.wanted.matrix(entry), self.pairs) for number, entry in self.entries.items()}


def _of_pairs(products: Tensor, pairs: int) -> Tensor:
    """The entries `[k, 3]` of pairs among products of all rows `[2k, 2k]`."""
    squares = products.diagonal()
    return torch.stack([squares[:pairs], squares[pairs:], products.diagonal(pairs)], 1)


def mark_completions(observation: BackwardObservation) -> bool:
    """Where a loss weighs tokens differently, mark completions alone, with `c` their mean; whether it was possible."""
    # ORPO's likelihood term is over the prompt too, on the chosen side alone. Prompts are shared, so a completion
    # starts where the later of the two rows starts to be weighed. Where both rows are weighed from their first token on
    # and begin alike, nothing says where the prompt ends.
    if observation.sides == 1:
        for number, (_, marks) in enumerate(observation.rows):
            observation.c[number] = observation.tokens[number][marks].mean() if bool(marks.any()) else 0.0
        return True
    for pair in range(observation.pairs):
        numbers = (pair, observation.pairs + pair)
        sides = [observation.rows[number] for number in numbers]
        if not all(bool(marks.any()) for _, marks in sides):
            continue
        starts = [int(marks.int().argmax()) for _, marks in sides]
        start = max(starts)
        if not observation.has_given_marks and start == 1 and torch.equal(sides[0][0][:2], sides[1][0][:2]):
            return False
        if starts[0] != starts[1] and torch.equal(sides[0][0][:start], sides[1][0][:start]):
            for number, (ids, marks) in zip(numbers, sides, strict=True):
                marks = marks.clone()
                marks[:start] = False
                observation.rows[number] = (ids, marks)
        for number in numbers:
            marks = observation.rows[number][1]
            observation.c[number] = observation.tokens[number][marks].mean() if bool(marks.any()) else 0.0
    return True
