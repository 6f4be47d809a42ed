"""The tokens of some of the pairs: which pairs, their token matrices, and one row a token for `tokens.parquet`.

Letters: T_w and T_l completion tokens of chosen and rejected; a a chosen token, b a rejected one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradent.errors import GradentError, InputError, NonFiniteError
from gradent.loading.preferences import AuditPair
from gradent.pairs.batch import PairBatch
from gradent.record import TOKEN_COLUMNS
from gradent.text import token_texts
from gradent.tokens.effects import token_effects
from gradent.tokens.gram import TokenGram, match_tokens
from gradent.tokens.matrix import measure_tokens

__all__ = [
    "check_token_pairs",
    "choose_pairs",
    "face_tokens",
    "named_errors",
    "refuse_non_finite",
    "scan_tokens",
    "token_cost",
    "token_rows",
]

Matches = Sequence[tuple[int, int]]


def check_token_pairs(count: int | None) -> None:
    """Refuse a number of pairs that cannot be measured, before a model is loaded for it.

    Args:
        count: pairs whose tokens to measure; None for no tokens.

    Raises:
        InputError: below 1.
    """
    if count is not None and count < 1:
        raise InputError(
            f"token_pairs is {count}; it must be at least 1, or left out to measure no tokens (command line: "
            "--token-pairs)."
        )


def choose_pairs(cosines: Sequence[float | None], count: int) -> list[int]:
    """Pairs that stand for all of them: the middles of `count` equal slices of the pairs sorted by cosine.

    No chance is in it, and no preference for the worst: one pair is the median, three are the quantiles 1/6, 1/2 and
    5/6. Pairs without a cosine come after all others, so a slice of them has its share too.

    Args:
        cosines: one a pair; None where undefined.
        count: how many, at least 1; all where there are no more.

    Returns:
        Positions in `cosines`, smallest first.
    """
    keys = [(cosine is None, 0.0 if cosine is None else cosine) for cosine in cosines]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    count = min(count, len(order))
    return sorted(order[(2 * slice_ + 1) * len(order) // (2 * count)] for slice_ in range(count))


def face_tokens(matched: Matches, chosen_len: int, rejected_len: int) -> list[tuple[int, int]]:
    """Differing tokens that stand in each other's place: in the same gap of the alignment, at the same offset.

    A gap is what lies between two neighbouring matches, before the first or after the last. Where it is longer on one
    side, its last tokens there face nothing, as do tokens that are inserted.

    Args:
        matched: what `match_tokens` returned.
        chosen_len: T_w.
        rejected_len: T_l.

    Returns:
        `(a, b)`, both increasing.

    Example:
        >>> face_tokens([(1, 1)], 4, 3)  # of "x = 1 2" and "y = 3": x faces y, 1 faces 3, 2 faces nothing
        [(0, 0), (2, 2)]
    """
    ends = [*matched, (chosen_len, rejected_len)]
    starts = [(0, 0), *((a + 1, b + 1) for a, b in matched)]
    return [
        (a + offset, b + offset)
        for (a, b), (end_a, end_b) in zip(starts, ends, strict=True)
        for offset in range(min(end_a - a, end_b - b))
    ]


def token_rows(
    pair: int, gram: TokenGram, own: tuple[Tensor, Tensor], texts: tuple[Sequence[str], Sequence[str]]
) -> dict[str, list[Any]]:
    """The rows of one pair, chosen tokens first.

    Args:
        pair: its row in the data.
        gram: its token matrix.
        own: inner products of the chosen tokens with `g_w`, `[T_w]`, and of the rejected ones with `g_l`, `[T_l]`.
        texts: of the chosen tokens, and of the rejected ones.

    Returns:
        The columns of `record.TOKEN_COLUMNS` but `checkpoint` and `step`, T_w + T_l values each.
    """
    ids = gram.chosen_ids.tolist(), gram.rejected_ids.tolist()
    matched = match_tokens(*ids)
    faced = face_tokens(matched, len(ids[0]), len(ids[1]))
    squares = gram.chosen_sq, gram.rejected_sq
    entanglements = gram.chosen_entanglement, gram.rejected_entanglement
    columns: dict[str, list[Any]] = {name: [] for name in TOKEN_COLUMNS if name not in {"checkpoint", "step"}}
    for side, name in enumerate(("chosen", "rejected")):
        count = len(ids[side])
        aligned, facing = (_entries(gram, where, side) for where in (matched, faced))
        columns["pair"] += [pair] * count
        columns["side"] += [name] * count
        columns["position"] += range(count)
        columns["token_id"] += ids[side]
        columns["token"] += texts[side]
        columns["identical"] += [place in aligned for place in range(count)]
        columns["sq"] += squares[side].tolist()
        columns["entanglement"] += entanglements[side].tolist()
        columns["aligned_inner"] += [aligned.get(place) for place in range(count)]
        columns["facing_inner"] += [facing.get(place) for place in range(count)]
        columns["own_inner"] += own[side].tolist()
    return columns


def _entries(gram: TokenGram, where: Matches, side: int) -> Mapping[int, float]:
    """Of some entries of the matrix: the token on one side -> the entry."""
    return {(a, b)[side]: float(gram.inner[a, b]) for a, b in where}


def token_cost(pair: AuditPair) -> int:
    """What a pair's matrix costs, for a bar that knows how much is left.

    Args:
        pair: the pair.

    Returns:
        Tokens of the prefixes that end with a token of either response.
    """
    prompt = len(pair.prompt_ids)
    return sum(n * prompt + n * (n + 1) // 2 for n in (len(pair.chosen_ids), len(pair.rejected_ids)))


def scan_tokens(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[AuditPair],
    *,
    memory_budget: int | str | None = None,
    advance: Callable[[int, int], None] = lambda pairs, cost: None,
) -> dict[str, list[Any]]:
    """Measure the token matrix of every given pair, the longest first: what cannot be done fails at once.

    Args:
        model: a causal LM; its trainable parameters are what is measured.
        tokenizer: the model's, for the texts of tokens.
        pairs: the pairs, at least one.
        memory_budget: as in `measure_tokens`.
        advance: called after each pair with 1 and the pair's `token_cost`.

    Returns:
        The columns of `record.TOKEN_COLUMNS` but `checkpoint` and `step`, pair by pair in the order given.

    Raises:
        GradentError: what `measure_tokens` raises; a nan or an inf, or a device out of memory, with the row.
    """
    measured: dict[int, dict[str, list[Any]]] = {}
    for position in sorted(range(len(pairs)), key=lambda position: -token_cost(pairs[position])):
        pair = pairs[position]
        gram, own = _measure(model, pair, memory_budget)
        texts = token_texts(tokenizer, pair.chosen_ids), token_texts(tokenizer, pair.rejected_ids)
        measured[position] = token_rows(pair.row, gram, own, texts)
        advance(1, token_cost(pair))
    blocks = [measured[position] for position in range(len(pairs))]
    return {name: [value for block in blocks for value in block[name]] for name in blocks[0]}


def _measure(model: Any, pair: AuditPair, memory_budget: int | str | None) -> tuple[TokenGram, tuple[Tensor, Tensor]]:
    """The token matrix, and each token's inner product with the gradient of its own response."""
    batch = PairBatch.from_tokens([(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)])
    with named_errors(pair, "token matrix", ", --dtype bfloat16, or leave --token-pairs out"):
        (gram,) = measure_tokens(model, batch, memory_budget=memory_budget, progress=False)
        ((chosen, _),) = batch.split_tokens(token_effects(model, batch, toward="chosen"))
        ((_, rejected),) = batch.split_tokens(token_effects(model, batch, toward="rejected"))
    found = (gram.inner.flatten(), gram.chosen_sq, gram.rejected_sq, chosen, rejected)
    refuse_non_finite(pair, found, "leave --token-pairs out")
    return gram, (chosen, rejected)


@contextmanager
def named_errors(pair: AuditPair, what: str, remedies: str) -> Iterator[None]:
    """Say at which row the measurement of a pair's tokens failed.

    Args:
        pair: the pair.
        what: what of it was measured.
        remedies: what else to try where memory ran out, after the usual.

    Yields:
        Nothing.

    Raises:
        NonFiniteError: as inside, with the row.
        GradentError: the device ran out of memory.
    """
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{pair.where}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise GradentError(
            f"{pair.where}: the device ran out of memory on this pair's {what} ({pair.longest} tokens in its longer "
            f"row). Try a smaller --memory-budget or --max-length{remedies}."
        ) from error


def refuse_non_finite(pair: AuditPair, parts: Sequence[Tensor], remedy: str) -> None:
    """Refuse figures of a pair's tokens that are nan or inf.

    Args:
        pair: the pair.
        parts: its figures, each `[n]`.
        remedy: what to do if a wider dtype does not help.

    Raises:
        NonFiniteError: with the row.
    """
    if not bool(torch.cat(list(parts)).isfinite().all()):
        raise NonFiniteError(
            f"{pair.where}: the gradient of one of its tokens is nan or inf. Try --dtype float32 (or float64), or "
            f"{remedy}."
        )
