"""The token matrix of one pair of a training step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gradent.recorder.recording import Recording
from gradent.tokens.gram import TokenGram
from gradent.tokens.matrix import measure_tokens

__all__ = ["TokenMap", "map_tokens"]


@dataclass(frozen=True, kw_only=True)
class TokenMap:
    """A pair's token matrix `gram` before the optimizer's step; `pair` is the pair's place in the step's record."""

    pair: int
    gram: TokenGram


def map_tokens(model: nn.Module, recording: Recording, budget: int | str | None) -> TokenMap | None:
    """Measure the tokens of a recording's most entangled pair; None without a cosine, and for a reward model."""
    cosine = recording.gram.cosine.nan_to_num(nan=-2.0)
    if recording.batch is None or not len(cosine) or float(cosine.max()) < -1.5:
        return None
    pair = int(cosine.argmax())
    (gram,) = measure_tokens(model, recording.batch.select([pair]), memory_budget=budget, progress=False)
    return TokenMap(pair=pair, gram=gram)
