"""One backward of a trainer under watch: which row is which, and what its forwards told.

Letters: N rows of a forward, k pairs, rows 0..k-1 chosen and k..2k-1 rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradent.hooks.capture.capture import Tap
from gradent.hooks.overhead import Clock, wait_for
from gradent.hooks.piggyback.coefficients import Coefficients
from gradent.hooks.piggyback.pairing import Pairing, pair_rows
from gradent.hooks.reduction.collector import Collector
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.reduction.reducers import Place
from gradent.kernels.common.wanted import Wanted
from gradent.pair_gram import on_cpu

if TYPE_CHECKING:
    from gradent.hooks.piggyback.forward import WatchedForward

__all__ = ["Passed", "WatchedBackward", "Watching", "addressed_to", "mark_completions"]


@dataclass(eq=False)
class Passed:
    """One backward of the trainer, with the one or two forwards below it, and what it told.

    Attributes:
        rows: `(ids int64 [T], marks bool [T])` of the 2k rows that are paired, real tokens only, on the CPU.
        tokens: each token's own coefficient, float64 `[T]`, of those rows.
        constant: whether a row's tokens share one coefficient.
        given: whether the marks came with the batch.
        c: `∂L/∂log π(y|x)` of those rows, float64 `[2k]`.
        logps: their log-probs (a reward model's rewards), float64 `[2k]`.
        unpaired: rows that found no partner.
        reward: the model is a reward model.
        entries: parameter number -> `[k, 3]` float64, in the order of the backward pass; complete if `problem` is None.
        problem: why there are no entries, or None.
        broken: why not even the coefficients can be used, or None.
        shared: parameters whose gradient the trainer's backward took from the measurement.
    """

    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    constant: bool = True
    given: bool = True
    c: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    logps: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    unpaired: int = 0
    reward: bool = False
    entries: dict[int, Tensor] = field(default_factory=dict)
    problem: str | None = None
    broken: str | None = None
    shared: int = 0


_addressed: list[WatchedBackward | None] = []
"""Whom a backward that runs now is for, innermost last; not context-local, since autograd has threads of its own."""


@contextmanager
def addressed_to(group: WatchedBackward | None) -> Iterator[None]:
    """A backward of gradent's own on a trainer's graph: nobody else who watches that graph takes it for the trainer's.

    Args:
        group: who alone sees it; None for nobody.

    Yields:
        Nothing.
    """
    _addressed.append(group)
    try:
        yield
    finally:
        _addressed.pop()


@dataclass(kw_only=True, eq=False)
class Watching:
    """What is watched, and how.

    Attributes:
        model: the model that the trainer calls.
        names: the trainable parameters' names.
        parameters: the parameters, whose numbers are their places here.
        sharded: modules with sharded parameters (FSDP2), each with `{attribute: number}`.
        budget: bytes that the reductions' tiles may take.
        pairing: which rows of a forward are chosen, which rejected.
        weight: parameter number -> square root of the metric's diagonal, or None.
        entries: capture uses too; without, only coefficients are read.
        trusted: the loss sees log-probs alone, whatever else the model is asked for.
        share: give the trainer's backward the weight gradients that the measured products add up to.
        clock: the time spent on watching.
    """

    model: nn.Module
    names: Sequence[str]
    parameters: Sequence[Tensor]
    sharded: Mapping[nn.Module, Mapping[str, int]]
    budget: int
    pairing: Pairing
    weight: Callable[[int], Tensor] | None
    entries: bool
    trusted: bool
    share: bool
    clock: Clock


class WatchedBackward:
    """The forwards below one backward: one of pairs, or one of chosen rows and then one of rejected rows."""

    def __init__(self, owner: Watching) -> None:
        self.owner = owner
        self.forwards: list[WatchedForward] = []
        self.passed = Passed()
        self.started = False
        self.expected: list[tuple[WatchedForward, Tap]] = []
        self.collector: Collector | None = None
        self.hidden = False
        self._finished = False
        self.grads: list[int] = []
        self._rests = torch.zeros(0, dtype=torch.float64)
        self._moved: list[Tensor] = []

    def guarded(self, function: Callable[..., None], *args: Any) -> None:
        """Run a part of the watching; its errors become the pass's problem, and never the trainer's."""
        if _addressed and self is not _addressed[-1]:
            return
        try:
            with self.owner.clock:
                function(*args)
        except Exception as error:  # noqa: BLE001  (whatever it is, the training run must go on as if unobserved)
            self.errs(error)

    def errs(self, error: Exception) -> None:
        """Keep an error of gradent's own. Where memory ran out, a pass of gradent's own would need more still."""
        self.fail(f"gradent's own {type(error).__name__}: {error}")
        if isinstance(error, torch.OutOfMemoryError) and self.passed.broken is None:
            self.passed.broken = (
                "memory ran out, also with tiles of a quarter of memory_budget; give gradent a smaller memory_budget, "
                "or measure fewer pairs at once (a smaller batch, accumulated)"
            )
            if self.collector is not None:
                self.collector.clear()

    def fail(self, problem: str) -> None:
        """Keep why there can be no entries; the first reason stands."""
        if self.passed.problem is None:
            self.passed.problem = problem

    def start(self, first: WatchedForward, found: Coefficients) -> None:
        """The backward has reached the first output: settle which row is which."""
        self.started = True
        owner, passed = self.owner, self.passed
        if self.hidden:
            self.grads = [_grad_version(parameter) for parameter in owner.parameters]
        if len(self.forwards) > 2:
            self.fail(f"{len(self.forwards)} forwards preceded the backward")
            passed.broken = passed.problem
            return
        if len(self.forwards) == 2:
            counts = [forward.place.layout.rows for forward in self.forwards]
            if counts[0] != counts[1]:
                passed.broken = f"two forwards of {counts[0]} and {counts[1]} rows preceded the backward"
                return
            for forward, offset in zip(self.forwards, (0, counts[0]), strict=True):
                forward.place = Place(forward.place.layout, range(offset, offset + counts[0]))
            pairs = counts[0]
        else:
            order = pair_rows(owner.pairing, found.c)
            if isinstance(order, str):
                passed.broken = order
                return
            rows = [-1] * first.place.layout.rows
            for position, row in enumerate(order):
                rows[row] = position
            first.place = Place(first.place.layout, rows)
            pairs = len(order) // 2
            passed.unpaired = rows.count(-1)
        passed.c, passed.logps, self._rests = (torch.zeros(2 * pairs, dtype=torch.float64) for _ in range(3))
        passed.rows = [(torch.zeros(0), torch.zeros(0))] * (2 * pairs)
        passed.tokens = [torch.zeros(0)] * (2 * pairs)
        self.collector = Collector(Ledger(Wanted.pairs(pairs), budget=owner.budget, weight=owner.weight), owner.budget)
        for forward, tap in self.expected:
            self.collector.expect(tap, forward.place)

    def take(self, forward: WatchedForward, found: Coefficients, *, reward: bool) -> None:
        """What the gradient of one forward's output said."""
        if self.passed.broken is not None:
            return
        if not bool(found.c.isfinite().all()):
            self.fail("the gradient of the log-probs is not finite")
            self.passed.broken = self.passed.problem
            return
        if not found.constant:
            self.passed.constant = False
            self.fail(
                "the loss weighs the tokens of a response differently (by up to "
                f"{found.spread:.1e} of the mean weight), so that its step is none of whole responses: the entries are "
                "exact, and the verdict, which is made with mean weights, is not"
            )
        self.passed.reward, self.passed.given = reward, self.passed.given and found.given
        ids, mask = forward.input_ids.cpu(), forward.attention_mask.cpu().bool()
        for row, position in enumerate(forward.place.rows):
            if position >= 0:
                keep = mask[row]
                self.passed.rows[position] = (ids[row][keep], found.marks[row][keep])
                self.passed.tokens[position] = found.tokens[row][keep]
                self.passed.c[position], self.passed.logps[position] = found.c[row], found.logp[row]

    def note_rests(self, forward: WatchedForward, rests: Sequence[float]) -> None:
        """Keep what is left of each row's factor: entries are measured with powers of two, which round nothing."""
        for row, position in enumerate(forward.place.rows):
            if 0 <= position < len(self._rests):
                self._rests[position] = rests[row]

    def note_still(self, moved: Tensor) -> None:
        """Keep a scalar on the model's device that is zero where padding got no gradient; looked at in the end."""
        self._moved.append(moved.float())

    def finish(self) -> None:
        """The backward is over: settle what it told, once, and let go of its graph."""
        if self._finished:
            return
        self._finished = True
        passed = self.passed
        if self.started and passed.problem is None and passed.broken is None and self.collector is not None:
            for device in {entry.device for entry in self.collector.ledger.entries.values()}:
                wait_for(device)
            self.guarded(self._settle, self.collector)
        if self.started and any(not forward.read for forward in self.forwards):
            why = "" if passed.problem is None else f" ({passed.problem})"
            passed.broken = passed.broken or f"the backward did not reach every forward{why}"
        elif not self.started and passed.problem is not None:  # nothing to read was found, so a backward went unseen
            passed.broken = passed.broken or passed.problem
        if len(self.forwards) == 2 and passed.broken is None and not _sides(passed.c):
            passed.broken = (
                "two forwards preceded the backward, and they are not the chosen rows and then the rejected rows: "
                "their weights have other signs"
            )
        self.close()

    def _settle(self, collector: Collector) -> None:
        collector.ledger.close()
        if any(float(moved) != 0 for moved in on_cpu(dict(enumerate(self._moved))).values()):
            self.fail("padding after the responses gets a gradient too, as if the model looked ahead")
        entries, wanted = on_cpu(collector.ledger.entries), collector.ledger.wanted
        self.passed.entries = {n: wanted.scaled(entry, self._rests).view(-1, 3) for n, entry in entries.items()}
        self.passed.shared = collector.shared
        parameters = self.owner.parameters
        # What got a gradient from a hidden region, where no use of it was seen.
        missed = {
            number
            for number, before in enumerate(self.grads)
            if number not in self.passed.entries and _grad_version(parameters[number]) != before
        }
        lost = set(collector.open) | missed
        if lost and self.owner.entries:
            self.fail(f"the backward did not bring all it should for {self.listed(lost)}")

    def listed(self, numbers: Iterable[int]) -> str:
        """Some of the parameters' names, for a message."""
        names = [self.owner.names[number] for number in sorted(numbers)]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    def close(self) -> None:
        """Let go of every graph."""
        for forward in self.forwards:
            forward.close()
        self.expected.clear()
        if self.collector is not None:
            self.collector.clear()


def _sides(c: Tensor) -> bool:
    """Whether the loss wants the first half of the log-probs up and the second half down."""
    chosen, rejected = c.chunk(2)
    return bool((chosen <= 0).all() and (rejected >= 0).all())


def _grad_version(parameter: Tensor) -> int:
    """A number that changes when a gradient is accumulated: -1 without a gradient, its version with one."""
    return -1 if parameter.grad is None else parameter.grad._version  # noqa: SLF001  (no public name for it)


def mark_completions(passed: Passed) -> bool:
    """In a pass whose loss weighs tokens differently, mark completions alone, with `c` the mean over them.

    ORPO's term of likelihood is over the prompt too, on the chosen side alone. Prompts are shared, so a completion
    starts where the later of the two rows starts to be weighed.

    Args:
        passed: the pass, which is changed.

    Returns:
        Whether that can be done: not where both rows are weighed from their first token on and begin alike, since
        nothing then says where the prompt ends.
    """
    pairs = len(passed.rows) // 2
    for pair in range(pairs):
        numbers = (pair, pairs + pair)
        sides = [passed.rows[number] for number in numbers]
        if not all(bool(marks.any()) for _, marks in sides):
            continue
        starts = [int(marks.int().argmax()) for _, marks in sides]
        start = max(starts)
        if not passed.given and start == 1 and torch.equal(sides[0][0][:2], sides[1][0][:2]):
            return False
        if starts[0] != starts[1] and torch.equal(sides[0][0][:start], sides[1][0][:start]):
            for number, (ids, marks) in zip(numbers, sides, strict=True):
                kept = marks.clone()
                kept[:start] = False
                passed.rows[number] = (ids, kept)
        for number in numbers:
            marks = passed.rows[number][1]
            passed.c[number] = passed.tokens[number][marks].mean() if bool(marks.any()) else 0.0
    return True
