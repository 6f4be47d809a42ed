"""The tokens of some of the pairs: which pairs, their token matrices, and one row a token for `tokens.parquet`.

Letters: T_w and T_l completion tokens of chosen and rejected; a a chosen token, b a rejected one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradent.errors import GradentError, NonFiniteError
from gradent.loading.preferences import AuditPair, batch_of
from gradent.loading.rollouts import RolloutGroup
from gradent.record import TOKEN_COLUMNS
from gradent.record.table import Floats
from gradent.text import token_texts
from gradent.tokens.effects import token_effects
from gradent.tokens.gram import TokenGram, match_tokens
from gradent.tokens.matrix import measure_tokens

__all__ = [
    "choose_pairs", "face_tokens", "measure_pair_tokens", "named_errors", "refuse_non_finite", "token_cost",
    "token_rows",
]  # fmt: skip

Matches = Sequence[tuple[int, int]]


def choose_pairs(cosines: Sequence[float | None] | Floats, count: int) -> list[int]:
    """Positions that stand for all pairs `[P]`: the middles of `count` equal slices of the pairs sorted by cosine."""
    # No chance is in it, and no preference for the worst: one pair is the median, three are the quantiles 1/6, 1/2 and
    # 5/6. Pairs without a cosine (nan) come after all others, so a slice of them has its share too.
    order = np.argsort(np.asarray(cosines, dtype=np.float64), kind="stable")
    count = min(count, len(order))
    return sorted(int(order[(2 * part + 1) * len(order) // (2 * count)]) for part in range(count))


def face_tokens(matched: Matches, chosen_len: int, rejected_len: int) -> list[tuple[int, int]]:
    """Differing tokens that stand in each other's place: in the same gap of the alignment, at the same offset."""
    # A gap is what lies between two neighbouring matches, before the first or after the last. Where it is longer on one
    # side, its last tokens there face nothing, as do tokens that are inserted.
    ends = [*matched, (chosen_len, rejected_len)]
    starts = [(0, 0), *((a + 1, b + 1) for a, b in matched)]
    return [
        (a + offset, b + offset)
        for (a, b), (end_a, end_b) in zip(starts, ends, strict=True)
        for offset in range(min(end_a - a, end_b - b))
    ]


def token_rows(
    pair: int, gram: TokenGram, own_inner: tuple[Tensor, Tensor], texts: tuple[Sequence[str], Sequence[str]]
) -> dict[str, list[Any]]:
    """The rows of one pair, chosen tokens first; `own_inner` holds `⟨g^a, g_w⟩` `[T_w]` and `⟨g^b, g_l⟩` `[T_l]`."""
    ids = gram.chosen_ids.tolist(), gram.rejected_ids.tolist()
    matched = match_tokens(*ids)
    faced = face_tokens(matched, len(ids[0]), len(ids[1]))
    squares = gram.chosen_sq, gram.rejected_sq
    entanglements = gram.chosen_entanglement, gram.rejected_entanglement
    columns: dict[str, list[Any]] = {name: [] for name in TOKEN_COLUMNS if name not in {"checkpoint", "step"}}
    for side, name in enumerate(("chosen", "rejected")):
        count = len(ids[side])
        aligned, facing = (  # entries of the matrix, by their token on this side
            {match[side]: float(gram.inner[match]) for match in places} for places in (matched, faced)
        )
        rows: dict[str, Iterable[Any]] = {
            "pair": [pair] * count, "side": [name] * count, "position": range(count), "token_id": ids[side],
            "token": texts[side], "identical": [place in aligned for place in range(count)],
            "sq": squares[side].tolist(), "entanglement": entanglements[side].tolist(),
            "aligned_inner": map(aligned.get, range(count)), "facing_inner": map(facing.get, range(count)),
            "own_inner": own_inner[side].tolist(),
        }  # fmt: skip
        for column, values in rows.items():
            columns[column] += values
    return columns


def token_cost(pair: AuditPair) -> int:
    """Cost of a pair's matrix: tokens of the prefixes that end with a token of either response."""
    sizes = [(len(prompt), len(ids)) for prompt, ids in pair.rows]
    return sum(n * prompt + n * (n + 1) // 2 for prompt, n in sizes)


def measure_pair_tokens(
    model: Any, tokenizer: Any, pair: AuditPair, *, memory_budget: int | str | None = None
) -> dict[str, list[Any]]:
    """The columns of `record.TOKEN_COLUMNS` but `checkpoint` and `step` for one pair; an error names the row."""
    batch = batch_of([pair])
    with named_errors(pair, "token matrix", ", --dtype bfloat16, or leave --token-pairs out"):
        (gram,) = measure_tokens(model, batch, memory_budget=memory_budget, progress=False)
        ((chosen, _),) = batch.split_tokens(token_effects(model, batch, toward="chosen"))
        ((_, rejected),) = batch.split_tokens(token_effects(model, batch, toward="rejected"))
    parts = (gram.inner.flatten(), gram.chosen_sq, gram.rejected_sq, chosen, rejected)
    refuse_non_finite(pair, parts, "leave --token-pairs out")
    texts = token_texts(tokenizer, pair.chosen_ids), token_texts(tokenizer, pair.rejected_ids)
    return token_rows(pair.row, gram, (chosen, rejected), texts)


@contextmanager
def named_errors(pair: AuditPair | RolloutGroup, what: str, remedies: str) -> Iterator[None]:
    """Add the row to an error of its tokens' measurement, and remedies where memory ran out."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{pair.where}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise GradentError(
            f"{pair.where}: the device ran out of memory on this row's {what} ({pair.longest} tokens in the longest "
            f"response with its prompt). Try a smaller --memory-budget or --max-length{remedies}."
        ) from error


def refuse_non_finite(pair: AuditPair, parts: Sequence[Tensor], remedy: str) -> None:
    """Refuse figures of a pair's tokens that are nan or inf."""
    if not bool(torch.cat(list(parts)).isfinite().all()):
        raise NonFiniteError(
            f"{pair.where}: the gradient of one of its tokens is nan or inf. Try --dtype float32 (or float64), or "
            f"{remedy}."
        )
