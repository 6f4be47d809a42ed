"""From the columns of `tokens.parquet` to what `summary.json` says of tokens. Numbers in, numbers out: no torch.

A pair's `⟨g_w, g_l⟩` is split as by `TokenGram.split`: an entry of two identical tokens is theirs, one of two differing
tokens theirs, and of one of each half goes to either. Entanglement sums over a side to the inner, so that a kind's part
is half of what its tokens sum to over both sides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from gradent.auditing.analysis.distributions import mean
from gradent.record.table import Floats, Table
from gradent.record.token_rows import rank_ends

__all__ = ["rank_tokens", "summarize_tokens"]

KEPT = 20  # tokens in each list of the summary
RECURRING = 2  # occurrences from which a token says more than its one place

Columns = Mapping[str, Any]


def summarize_tokens(tokens: Columns, pairs: Columns) -> dict[str, Any]:
    """What the token rows of some pairs say of the data; `pairs` holds the rows of these pairs at least."""
    table, rows = Table.read(tokens), Table.read(pairs)
    norms = dict(zip(rows["pair"].tolist(), np.sqrt(rows["chosen_sq"]) * np.sqrt(rows["rejected_sq"]), strict=True))
    numbers, which = np.unique(table["pair"], return_inverse=True)
    identical, halves = table["identical"], table["entanglement"] / 2
    # What a pair's identical and differing tokens give to its ⟨g_w, g_l⟩, `[N]` each.
    parts = {
        kind: np.bincount(which, weights=np.where(mask, halves, 0.0))
        for kind, mask in (("identical", identical), ("differing", ~identical))
    }
    inner, norm = parts["identical"] + parts["differing"], np.array([norms[pair] for pair in numbers.tolist()])
    scaled = norm > 0  # pairs that have a cosine
    total = float(inner.sum())
    return {
        "pairs": len(numbers),
        "undefined": int((~scaled).sum()),
        "tokens": table.rows,
        "identical_tokens": int(identical.sum()),
        # The mean cosine and its two parts.
        "cosine": {
            "mean": mean(inner[scaled] / norm[scaled]),
            **{kind: mean(part[scaled] / norm[scaled]) for kind, part in parts.items()},
        },
        # A part over the whole of its pair, which means little where the whole is near zero.
        "share": {kind: _quartiles(part[inner != 0] / inner[inner != 0]) for kind, part in parts.items()},
        "sum": {
            "inner": total, **{kind: float(part.sum()) for kind, part in parts.items()},
            "identical_share": float(parts["identical"].sum()) / total if total else None,
        },
        "aligned": _count(table, "aligned_inner", sign=1),
        "facing": _count(table, "facing_inner", sign=-1),
        **rank_tokens(table, norms),
    }  # fmt: skip


def rank_tokens(tokens: Columns, norms: Mapping[int, float], most: int = KEPT) -> dict[str, Any]:
    """The texts whose tokens entangle and disentangle most over all pairs, as parts of the pairs' cosines."""
    # Entanglement is taken over ‖g_w‖‖g_l‖ of its pair, so that no pair outweighs the others; a pair without a cosine
    # has no part in it.
    rows = Table.read(tokens).to_lists()
    occurrences: defaultdict[str, list[tuple[float, bool]]] = defaultdict(list)
    columns = (rows[name] for name in ("pair", "token", "entanglement", "identical"))
    for pair, text, entanglement, identical in zip(*columns, strict=True):
        if norms[pair] > 0:
            occurrences[text].append((float(entanglement / norms[pair]), identical))
    recurring = sum(len(marks) >= RECURRING for marks in occurrences.values())
    least = RECURRING if recurring >= 5 else 1
    ranked = [_token_row(text, marks) for text, marks in occurrences.items() if len(marks) >= least]
    ranked.sort(key=itemgetter("token"), reverse=True)  # of equal sums
    entangling, disentangling = rank_ends(ranked, itemgetter("sum"), most)
    # Texts that occur less often than `least_count` are left out.
    return {"least_count": least, "entangling": entangling, "disentangling": disentangling}


def _token_row(text: str, occurrences: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    total = sum(value for value, _ in occurrences)
    return {
        "token": text, "count": len(occurrences), "identical": sum(identical for _, identical in occurrences),
        "sum": total, "mean": total / len(occurrences),
    }  # fmt: skip


def _count(table: Table, column: str, *, sign: int) -> dict[str, Any]:
    """Entries, each once though both its tokens have it, and those of the sign that the paper expects."""
    entries = table[column][(table["side"] == "chosen") & np.isfinite(table[column])]
    expected = int((sign * entries > 0).sum())
    name = "positive" if sign > 0 else "negative"
    return {"count": len(entries), name: expected, "share": expected / len(entries) if len(entries) else None}


def _quartiles(values: Floats) -> dict[str, float | None]:
    return {f"p{share}": float(np.percentile(values, share)) if len(values) else None for share in (25, 50, 75)}
