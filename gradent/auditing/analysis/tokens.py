"""From the columns of `tokens.parquet` to what `summary.json` says of tokens. Numbers in, numbers out: no torch.

A pair's `⟨g_w, g_l⟩` is split as by `TokenGram.split`: an entry of two identical tokens is theirs, one of two differing
tokens theirs, and of one of each half goes to either. Entanglement sums over a side to the whole, so that a kind's part
is half of what its tokens sum to over both sides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from gradent.record.token_rows import rank_ends

__all__ = ["rank_tokens", "summarize_tokens"]

KEPT = 20  # tokens in each list of the summary
RECURRING = 2  # occurrences from which a token says more than its one place

Columns = Mapping[str, Sequence[Any]]


def summarize_tokens(tokens: Columns, pairs: Columns) -> dict[str, Any]:
    """What the measured tokens say of the data.

    Args:
        tokens: the columns of `record.TOKEN_COLUMNS`, of N pairs.
        pairs: the columns of `record.PAIR_COLUMNS`, of these pairs at least.

    Returns:
        `pairs` N; `undefined` how many of them have no cosine; `tokens` and `identical_tokens` how many there are;
        `cosine` the mean and its two parts, which add up to it; `share` the quartiles over the pairs of a part over the
        whole (a ratio: where the whole is near zero, it means little); `sum` the parts and the whole summed over the
        pairs, and the identical one's share of it; `aligned` how many matches there are, and how many have a positive
        inner product; `facing` how many differing tokens face each other, and how many have a negative one;
        `entangling`, `disentangling` and `least_count` as `rank_tokens` returns them.
    """
    norms = _norms(pairs)
    part = _parts(tokens)
    whole = {pair: parts["identical"] + parts["differing"] for pair, parts in part.items()}
    scaled = [pair for pair in part if norms[pair] > 0]
    return {
        "pairs": len(part),
        "undefined": len(part) - len(scaled),
        "tokens": len(tokens["pair"]),
        "identical_tokens": sum(tokens["identical"]),
        "cosine": {
            "mean": _mean([whole[pair] / norms[pair] for pair in scaled]),
            **{kind: _mean([part[pair][kind] / norms[pair] for pair in scaled]) for kind in ("identical", "differing")},
        },
        "share": {
            kind: _quartiles([part[pair][kind] / whole[pair] for pair in part if whole[pair]])
            for kind in ("identical", "differing")
        },
        "sum": _sums(part.values()),
        "aligned": _count(tokens, "aligned_inner", sign=1),
        "facing": _count(tokens, "facing_inner", sign=-1),
        **rank_tokens(tokens, norms),
    }


def rank_tokens(tokens: Columns, norms: Mapping[int, float], kept: int = KEPT) -> dict[str, Any]:
    """The tokens that pull the two gradients together most, and those that pull them apart most, over all pairs.

    A token is known by its text, in either response. Its entanglement is taken over `‖g_w‖‖g_l‖` of its pair, so that
    it is a part of the cosine and no pair outweighs the others.

    Args:
        tokens: the columns of `record.TOKEN_COLUMNS`.
        norms: `‖g_w‖‖g_l‖` by pair; tokens of a pair where it is zero are left out.
        kept: most tokens in each list.

    Returns:
        `entangling` (largest sums, positive ones only) and `disentangling` (smallest, negative ones only): lists of
        `token`, `count`, how many of these are `identical`, and `sum` and `mean` of the entanglement. `least_count`:
        tokens that occur less often are left out; 2, or 1 where fewer than five tokens occur twice.
    """
    found: defaultdict[str, list[tuple[float, bool]]] = defaultdict(list)
    columns = (tokens[name] for name in ("pair", "token", "entanglement", "identical"))
    for pair, text, entanglement, identical in zip(*columns, strict=True):
        if norms[pair] > 0:
            found[text].append((entanglement / norms[pair], identical))
    recurring = sum(len(each) >= RECURRING for each in found.values())
    least = RECURRING if recurring >= 5 else 1
    rows = [_token_row(text, each) for text, each in found.items() if len(each) >= least]
    rows.sort(key=itemgetter("token"), reverse=True)  # of equal sums
    entangling, disentangling = rank_ends(rows, itemgetter("sum"), kept)
    return {"least_count": least, "entangling": entangling, "disentangling": disentangling}


def _token_row(text: str, occurrences: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    total = float(sum(value for value, _ in occurrences))
    return {
        "token": text,
        "count": len(occurrences),
        "identical": sum(identical for _, identical in occurrences),
        "sum": total,
        "mean": total / len(occurrences),
    }


def _norms(pairs: Columns) -> dict[int, float]:
    """Pair -> `‖g_w‖‖g_l‖`."""
    columns = (pairs[name] for name in ("pair", "chosen_sq", "rejected_sq"))
    return {pair: float(np.sqrt(chosen) * np.sqrt(rejected)) for pair, chosen, rejected in zip(*columns, strict=True)}


def _parts(tokens: Columns) -> dict[int, dict[str, float]]:
    """Pair -> what its identical and its differing tokens give to `⟨g_w, g_l⟩`."""
    parts: dict[int, dict[str, float]] = {}
    columns = (tokens[name] for name in ("pair", "entanglement", "identical"))
    for pair, entanglement, identical in zip(*columns, strict=True):
        part = parts.setdefault(pair, {"identical": 0.0, "differing": 0.0})
        part["identical" if identical else "differing"] += entanglement / 2
    return parts


def _sums(parts: Collection[Mapping[str, float]]) -> dict[str, float | None]:
    identical, differing = (sum(part[kind] for part in parts) for kind in ("identical", "differing"))
    inner = identical + differing
    return {
        "inner": inner,
        "identical": identical,
        "differing": differing,
        "identical_share": identical / inner if inner else None,
    }


def _count(tokens: Columns, column: str, *, sign: int) -> dict[str, Any]:
    """Entries, each once though both its tokens have it, and those of the sign that the paper expects."""
    entries = [
        value
        for side, value in zip(tokens["side"], tokens[column], strict=True)
        if side == "chosen" and value is not None
    ]
    expected = sum(sign * value > 0 for value in entries)
    name = "positive" if sign > 0 else "negative"
    return {"count": len(entries), name: expected, "share": expected / len(entries) if entries else None}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _quartiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}": float(np.percentile(values, percent)) if values else None for percent in (25, 50, 75)}
