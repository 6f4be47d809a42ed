"""Which rows of a trainer's batch are chosen and which rejected, and which belong together.

Letters: N rows of a batch, L tokens, T tokens of a row, padding left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gradent.errors import InputError

__all__ = ["Grouping", "Groups", "Pairing", "PairingEvidence", "pair_rows", "prompt_label"]

Pairing = Literal["halves", "thirds", "either", "signs", "rows"]
"""`halves`: all chosen rows, then all rejected rows (DPO, CPO, ORPO, reward models). `thirds`: a third block follows
that belongs to no pair (TPO). `either`: halves, where either row of a pair may be the chosen one; it is the one that
the loss wants up more (OnlineDPO, where a reward decides). `signs`: rows in any order, chosen where the loss wants the
log-prob up, rejected where it wants it down, the first chosen beside the first rejected and so on. `rows`: no pairs,
but rows in groups (GRPO, RLOO, KTO)."""

Row = tuple[Tensor, Tensor]
"""`(ids int64 [T], marks bool [T])`."""


def pair_rows(pairing: Pairing, c: Tensor) -> list[int] | str:
    """Row numbers of 2k paired rows, chosen first, from `c = ∂L/∂log π(y|x)` `[N]`; or why they do not pair up."""
    rows = len(c)
    if pairing == "signs":
        chosen, rejected = ([row for row in range(rows) if sign * float(c[row]) < 0] for sign in (1, -1))
        pairs = min(len(chosen), len(rejected))
        return chosen[:pairs] + rejected[:pairs]
    blocks = 3 if pairing == "thirds" else 2
    if rows % blocks:
        return f"the forward has {rows} rows, which are not {blocks} blocks of one size"
    pairs = rows // blocks
    if pairing == "either":
        is_swapped = [float(c[pair]) > float(c[pairs + pair]) for pair in range(pairs)]
        chosen = [pair + pairs * swap for pair, swap in enumerate(is_swapped)]
        return chosen + [pair + pairs * (not swap) for pair, swap in enumerate(is_swapped)]
    return list(range(2 * pairs))


RARE = 0.01
"""Rows whose order would be as rare as this among groups are pairs."""


class PairingEvidence:
    """Whether batches hold pairs, where nobody says so: decided by the first batches that the loss moves, for all."""

    def __init__(self) -> None:
        self._found: Literal["halves", "rows"] | None = None
        self._chance = 1.0
        """That groups would have come in the order of pairs in all batches so far."""
        self._batches: set[int] = set()  # of them, which one run can use several times

    def decide(self, rows: Sequence[Row], c: Tensor) -> Literal["halves", "rows"] | str:
        """How the rows of a batch with coefficients `[N]` belong together, or why they do not as those before."""
        has_prompts = _halves_share_prompts(rows)
        if self._found == "halves" and not has_prompts:
            return (
                "the rows of earlier batches were pairs (the first half shared its prompts with the second), and these "
                "are not; pairing= says how rows belong together"
            )
        if self._found is not None:
            return self._found
        if not bool(c.any()):  # nothing is moved: no evidence for later batches
            return "halves" if has_prompts else "rows"
        found = self._tell(rows, c) if has_prompts else "rows"
        self._found = "halves" if found == "halves" else "rows" if found == "rows" else None
        return found

    @property
    def is_told(self) -> bool:
        """Whether a batch has decided."""
        return self._found is not None

    def _tell(self, rows: Sequence[Row], c: Tensor) -> Literal["halves", "rows"] | str:
        """What rows are whose halves share their prompts, from which of them the loss wants up and which down."""
        first, second = c.view(2, -1)
        # A loss can turn a pair round (IPO, beyond its margin).
        if not bool((first * second < 0).any()) or not bool((first * second <= 0).all()):
            return "rows"
        prompts: dict[tuple[int, ...], list[int]] = {}
        for pair, (one, other) in enumerate(zip(rows, rows[len(first) :], strict=False)):
            prompts.setdefault(tuple(one[0][: _response_start(one, other)].tolist()), []).append(pair)
        if len(prompts) == len(first):
            return "halves"
        # More than two rows of one prompt may be a group, in which signs come in any order: here, too, by chance.
        if not bool(((first <= 0) & (second >= 0)).all()):
            return "rows"
        batch = hash(tuple(tuple(ids.tolist()) for ids, _ in rows))
        if batch not in self._batches:
            self._batches.add(batch)
            for pairs in prompts.values():
                raised, lowered = int((first[pairs] < 0).sum()), int((second[pairs] > 0).sum())
                self._chance /= math.comb(raised + lowered, raised)
        if self._chance <= RARE:
            return "halves"
        return (
            "a prompt has more than two rows, and the loss raises those of the first half and lowers those of the "
            "second: pairs, or a group of rollouts in this order by chance. Later batches tell; pairing= and groups= do"
        )


def _halves_share_prompts(rows: Sequence[Row]) -> bool:
    """Whether row i of the first half has the prompt of row i of the second, and another response, for all i."""
    pairs, odd = divmod(len(rows), 2)
    return pairs > 0 and not odd and all(_shares_prompt(rows[pair], rows[pairs + pair]) for pair in range(pairs))


def _shares_prompt(one: Row, other: Row) -> bool:
    start = _response_start(one, other)
    return min(len(one[0]), len(other[0])) >= start and torch.equal(one[0][:start], other[0][:start])


def _response_start(one: Row, other: Row) -> int:
    # A loss may weigh the prompt of one of the two rows (ORPO): the response starts where the later marks do.
    return max(1, *(int(marks.int().argmax()) for _, marks in (one, other)))


def prompt_label(row: Row) -> int:
    """A number that rows of one prompt share, on every rank and in every backward."""
    ids, marks = row
    start = int(marks.int().argmax()) if bool(marks.any()) else len(ids)
    digest = hashlib.blake2b(ids[:start].to(torch.int64).cpu().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _prompt_labels(rows: Sequence[Row]) -> list[int]:
    """`prompt_label` of each row; one without a response that shows is of the longest prompt that it begins with."""
    prompts = [ids[: int(marks.int().argmax())] for ids, marks in rows if marks.any()]
    labels = []
    for ids, marks in rows:
        fitting = [len(prompt) for prompt in prompts if torch.equal(ids[: len(prompt)], prompt)]
        if not marks.any() and fitting:
            marks = torch.arange(len(ids)) >= max(fitting)
        labels.append(prompt_label((ids, marks)))
    return labels


Groups = Literal["prompts", "batch"] | int | Sequence[int] | Callable[[Tensor], Sequence[int]]
"""`prompts`: rows of one prompt. `batch`: all rows (KTO, which contrasts them all). An int: so many rows that follow
one another. A sequence: a number for each row of a batch. A function: the same, from `input_ids` `[N, L]`."""


class Grouping:
    """Gives rows the labels of their groups; of numbers that somebody gave, other backwards' are others."""

    def __init__(self, groups: Groups) -> None:
        if isinstance(groups, str):
            is_accepted = groups in ("prompts", "batch")
        elif isinstance(groups, int):
            is_accepted = not isinstance(groups, bool) and groups >= 1
        else:
            is_accepted = callable(groups) or isinstance(groups, Sequence)
        if not is_accepted:
            raise InputError(
                f"groups={groups!r}; accepted are 'prompts', 'batch', a number of rows >= 1, a group number for each "
                "row of a batch, or a function that gives these from input_ids [N, L]."
            )
        self._groups = groups

    def label(self, input_ids: Tensor, rows: Sequence[Row], first: int, backward: int) -> list[int]:
        """Labels of a forward's rows, of which the first is row `first` of the backward with this number."""
        groups = self._groups
        if groups == "prompts":
            return _prompt_labels(rows)
        if groups == "batch":
            return [0] * len(rows)
        if isinstance(groups, int):
            return [backward << 32 | (first + row) // groups for row in range(len(rows))]
        if callable(groups):
            numbers = [int(number) for number in groups(input_ids)]
        else:
            assert isinstance(groups, Sequence)
            numbers = [(backward << 32) + int(number) for number in groups[first : first + len(rows)]]
        if len(numbers) != len(rows):
            raise InputError(
                f"groups: {len(numbers)} numbers for the {len(rows)} rows of a forward (from row {first} of its batch "
                "on); accepted is one for each row."
            )
        return numbers
