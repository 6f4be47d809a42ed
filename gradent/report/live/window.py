"""The measured steps between two logs, as plain numbers and text: what alerts and panels are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["EntangledPair", "TokenHeatMap", "Window"]


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
class TokenHeatMap:
    """Cosines of a pair's token gradients: `cosines[a][b]` of chosen token a and rejected token b; nan for none."""

    step: int
    chosen: Sequence[str]
    rejected: Sequence[str]
    cosines: Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some measured steps.

    Attributes:
        steps: their numbers, in order.
        cases: shares of the pairs by name of the case, one dict a step.
        pairs: active pairs of each step.
        chosen_needs: `⟨g_w,g_l⟩ / ‖g_w‖²` of each pair whose chosen falls: the `d_w/d_l` from which it would rise.
        weight_ratio: `d_w/d_l` of the same pairs.
        layer_cosines: `{layer: mean cosine in each step}`; None where a step has none.
        layer_inner: `{layer: sum over the window's pairs of its inner product}`.
        predicted: `(chosen_change, rejected_change)` of each pair, nats per unit of learning rate.
        realised: the changes that the optimizer's step really made, of the same pairs; empty unless asked for.
        entangled: the pairs with the largest cosine, with their text.
        tokens: the window's last token matrix; None where none was measured.
    """

    steps: Sequence[int]
    cases: Sequence[dict[str, float]]
    pairs: Sequence[int]
    chosen_needs: Sequence[float] = ()
    weight_ratio: Sequence[float] = ()
    layer_cosines: dict[str, list[float | None]] = field(default_factory=dict)
    layer_inner: dict[str, float] = field(default_factory=dict)
    predicted: Sequence[tuple[float, float]] = ()
    realised: Sequence[tuple[float, float]] = ()
    entangled: Sequence[EntangledPair] = ()
    tokens: TokenHeatMap | None = None

    def share(self, case: str) -> float:
        """Share of all the window's pairs in a case."""
        counts = [shares[case] * count for shares, count in zip(self.cases, self.pairs, strict=True)]
        return sum(counts) / max(1, sum(self.pairs))
