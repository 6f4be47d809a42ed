"""The token matrix of one pair of a training step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gradent.recorder import Recording
from gradent.tokens.gram import TokenGram
from gradent.tokens.matrix import measure_tokens

__all__ = ["TokenMap", "map_tokens"]


@dataclass(frozen=True, kw_only=True)
class TokenMap:
    """A pair's token matrix.

    Attributes:
        pair: the pair's place in the step's record.
        gram: its matrix, at the weights before the optimizer's step.
    """

    pair: int
    gram: TokenGram


def map_tokens(model: nn.Module, one: Recording, budget: int | str | None) -> TokenMap | None:
    """Measure the tokens of the most entangled pair of a recording.

    Args:
        model: the model, before the optimizer's step.
        one: what was harvested.
        budget: as `memory_budget` of `measure`.

    Returns:
        The map, or None where no pair has a cosine, or the model is a reward model.
    """
    cosine = one.gram.cosine.nan_to_num(nan=-2.0)
    if one.batch is None or not len(cosine) or float(cosine.max()) < -1.5:
        return None
    pair = int(cosine.argmax())
    (gram,) = measure_tokens(model, one.batch.select([pair]), memory_budget=budget, progress=False)
    return TokenMap(pair=pair, gram=gram)
