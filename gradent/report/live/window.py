"""The measured steps between two logs, as plain numbers and text: what alerts and panels are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["EntangledPair", "Push", "TokenHeatMap", "Window"]


@dataclass(frozen=True, kw_only=True)
class EntangledPair:
    """A pair to look at."""

    step: int
    cosine: float
    case: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class Push:
    """What one response's part of the gradient did to another response in a step."""

    step: int
    moved: str  # "chosen of pair 3"
    text: str
    change: float  # of all sources, nats
    by: str  # "rejected of pair 1"
    by_text: str
    push: float  # nats


@dataclass(frozen=True, kw_only=True)
class TokenHeatMap:
    """Cosines of a pair's token gradients: `cosines[a][b]` of chosen token a and rejected token b; nan for none."""

    step: int
    chosen: Sequence[str]
    rejected: Sequence[str]
    cosines: Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some measured steps."""

    steps: Sequence[int]  # their numbers, in order
    cases: Sequence[dict[str, float]]  # shares of the pairs by name of the case, one dict a step
    pairs: Sequence[int]  # active pairs of each step
    # `⟨g_w,g_l⟩ / ‖g_w‖²` of each pair in case 2: the `d_w/d_l` from which its chosen would rise
    chosen_needs: Sequence[float] = ()
    weight_ratio: Sequence[float] = ()  # `d_w/d_l` of the same pairs
    layer_cosines: dict[str, list[float | None]] = field(default_factory=dict)  # means by step; None for none
    layer_inner: dict[str, float] = field(default_factory=dict)  # sums over the window's pairs of the inner product
    predicted: Sequence[tuple[float, float]] = ()  # changes of both log-probs by pair, nats per unit of learning rate
    realised: Sequence[tuple[float, float]] = ()  # what the optimizer's step made of them; empty unless asked for
    # What moved chosen and rejected: side -> source -> mean over a step's pairs, nats, one number a step; nan for none
    moved: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    accounted: Sequence[tuple[float, float]] = ()  # their sums by pair, of both log-probs; nan for none
    is_whole: bool = (
        True  # all of the gradient is in these accounts: no other ranks', later micro-batches' or odd rows'
    )
    explained: float | None = None  # share of the realised changes' variance that they explain
    # Of the likelihood term with which chosen of an unseen pair would not have fallen, and its standard error
    nll_weight: tuple[float, float] | None = None
    pushes: Sequence[Push] = ()  # the rows that moved others most, with their text
    entangled: Sequence[EntangledPair] = ()  # the pairs with the largest cosine, with their text
    tokens: TokenHeatMap | None = None  # the window's last token matrix; None where none was measured

    @property
    def accounted_places(self) -> list[int]:
        """Places in `steps` of the steps that have an account."""
        columns = [column for columns in self.moved.values() for column in columns.values()]
        return [
            place for place in range(len(self.steps)) if columns and all(each[place] == each[place] for each in columns)
        ]

    def moved_mean(self, side: str, places: Sequence[int]) -> dict[str, float]:
        """Source to nats, the mean over the pairs of these steps, which have accounts."""
        pairs = sum(self.pairs[place] for place in places)
        return {
            source: sum(column[place] * self.pairs[place] for place in places) / max(1, pairs)
            for source, column in self.moved[side].items()
        }

    def share(self, case: str) -> float:
        """Share of all the window's pairs in a case."""
        counts = [shares[case] * count for shares, count in zip(self.cases, self.pairs, strict=True)]
        return sum(counts) / max(1, sum(self.pairs))
