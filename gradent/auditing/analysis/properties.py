"""Which properties of a pair go with its entanglement: edit distance, shared tokens, lengths and log-probs.

The paper's Section 4 finds that responses which share tokens have gradients which point the same way; whether that
holds for a data set at hand is a rank correlation away. Ids and numbers in, numbers out: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein, Postfix, Prefix

__all__ = ["FEWEST", "pair_properties", "rank_correlation", "summarize_properties"]

FEWEST = 10
"""Pairs below which nothing is said of a property."""

QUARTERS = 4
_NORMAL_95 = 1.959963984540054
_IDEAL = 1
_LOGPS = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
_MEASURED = ("cosine", "case", "chosen_len", "rejected_len", *_LOGPS)
_COUNTED = ("chosen_len", "rejected_len", "shared_prefix", "shared_suffix", "edit_distance")

Columns = Mapping[str, Sequence[Any]]
Floats = NDArray[np.float64]


def pair_properties(chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> dict[str, int]:
    """What the tokens of two responses have in common.

    Args:
        chosen_ids: tokens of the chosen response, prompt left out.
        rejected_ids: tokens of the rejected response.

    Returns:
        Counts of tokens, as `record.SAMPLE_COLUMNS` has them: `shared_prefix`, the longest common beginning;
        `shared_suffix`, the longest common end that does not overlap that beginning; `edit_distance`, the least number
        of insertions, deletions and replacements of tokens that make one response the other (Levenshtein).
    """
    chosen, rejected = list(chosen_ids), list(rejected_ids)
    prefix = Prefix.similarity(chosen, rejected)
    suffix = Postfix.similarity(chosen[prefix:], rejected[prefix:])
    return {
        "shared_prefix": prefix,
        "shared_suffix": suffix,
        "edit_distance": int(Levenshtein.distance(chosen, rejected)),
    }


def summarize_properties(pairs: Columns, sample: Columns) -> list[dict[str, Any]]:
    """How each property goes with the cosine of a pair's gradients, over the pairs whose cosine is defined.

    Args:
        pairs: the columns of `record.PAIR_COLUMNS`, of one checkpoint.
        sample: the columns of `record.SAMPLE_COLUMNS`, of these pairs at least.

    Returns:
        A row a property, the largest `|spearman|` first, those without one last: `property`, `label`, `unit`;
        `spearman`, its rank correlation with the cosine, with its 95% interval `low` to `high`, as
        `rank_correlation` has them; `reason`, why there is none, else None; `pairs`, how many it is over; `groups`, the
        quarters of the pairs by the property, smallest first: `low` and `high` (of the property in that group),
        `pairs`, `cosine` (mean) and `ideal` (share in case 1). Pairs of one value stay in one group, so there may be
        fewer than four; none below ten pairs. The margin against the reference is left out where there is none.
    """
    at = {pair: row for row, pair in enumerate(sample["pair"])}
    defined = [row for row, cosine in enumerate(pairs["cosine"]) if cosine is not None]
    here = _take(pairs, _MEASURED, defined)
    texts = _take(sample, _COUNTED, [at[pairs["pair"][row]] for row in defined])
    found = [_summarize(each, here["cosine"], here["case"] == _IDEAL) for each in _properties(here, texts)]
    return sorted(found, key=lambda row: (row["spearman"] is None, -abs(row["spearman"] or 0.0)))


def rank_correlation(x: Floats, y: Floats) -> tuple[float, float | None, float | None] | None:
    """Spearman's ρ, ties at their average rank, with its 95% interval.

    Args:
        x: float64 `[n]`.
        y: float64 `[n]`.

    Returns:
        `(ρ, low, high)`: the interval is Fisher's, with the variance `(1 + ρ²/2)/(n - 3)` of Bonett and Wright (2000);
        it is None at |ρ| = 1 and for three points or fewer. None in all where x or y is constant or empty.
    """
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rho = float(np.clip(np.corrcoef(_ranks(x), _ranks(y))[0, 1], -1, 1))
    if len(x) <= 3 or math.isclose(abs(rho), 1, abs_tol=1e-12):
        return rho, None, None
    centre, reach = math.atanh(rho), _NORMAL_95 * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return rho, math.tanh(centre - reach), math.tanh(centre + reach)


@dataclass(frozen=True, kw_only=True)
class _Property:
    """A property of the pairs, float64 `[n]`, and how a table names it."""

    name: str
    label: str
    unit: str
    values: Floats


def _properties(here: Mapping[str, Floats], texts: Mapping[str, Floats]) -> Iterator[_Property]:
    longer = np.maximum(texts["chosen_len"], texts["rejected_len"])
    shorter = np.minimum(texts["chosen_len"], texts["rejected_len"])
    chosen = here["chosen_logp"] / here["chosen_len"]
    rejected = here["rejected_logp"] / here["rejected_len"]
    of_longer, of_shorter = (f"share of the {which} response's tokens" for which in ("longer", "shorter"))
    ratio = here["chosen_len"] / here["rejected_len"]
    margin = here["chosen_logp"] - here["ref_chosen_logp"] - (here["rejected_logp"] - here["ref_rejected_logp"])
    averaged = "nats a token, each response averaged over its own"
    listed = [
        ("edit_distance", "Edit distance", of_longer, texts["edit_distance"] / longer),
        ("shared_prefix", "Shared beginning", of_shorter, texts["shared_prefix"] / shorter),
        ("shared_suffix", "Shared end", of_shorter, texts["shared_suffix"] / shorter),
        ("length_ratio", "Length ratio", "chosen tokens for each rejected token", ratio),
        ("length", "Length of both responses", "tokens", here["chosen_len"] + here["rejected_len"]),
        ("chosen_logp", "Log-prob of chosen", "nats a token", chosen),
        ("rejected_logp", "Log-prob of rejected", "nats a token", rejected),
        ("margin", "Margin log π(y_w) - log π(y_l)", averaged, chosen - rejected),
        ("reference_margin", "Margin against the reference", "nats, summed over the responses", margin),
    ]
    for name, label, unit, values in listed:
        if name != "reference_margin" or np.isfinite(values).any():
            yield _Property(name=name, label=label, unit=unit, values=values)


def _summarize(each: _Property, cosine: Floats, ideal: NDArray[np.bool_]) -> dict[str, Any]:
    there = np.isfinite(each.values)
    values, cosine, ideal = each.values[there], cosine[there], ideal[there]
    correlation: tuple[float | None, float | None, float | None] | None = None
    reason = None
    if len(values) < FEWEST:
        reason = f"fewer than {FEWEST} pairs"
    else:
        correlation = rank_correlation(values, cosine)
    if correlation is None and reason is None:
        reason = f"{'the property' if np.ptp(values) == 0 else 'the cosine'} is the same for all pairs"
    rho, low, high = correlation or (None, None, None)
    return {
        "property": each.name,
        "label": each.label,
        "unit": each.unit,
        "spearman": rho,
        "low": low,
        "high": high,
        "reason": reason,
        "pairs": len(values),
        "groups": list(_groups(values, cosine, ideal)) if len(values) >= FEWEST else [],
    }


def _groups(values: Floats, cosine: Floats, ideal: NDArray[np.bool_]) -> Iterator[dict[str, Any]]:
    """Quarters by rank, ties together."""
    quarter = np.floor(QUARTERS * (_ranks(values) - 0.5) / len(values))
    for number in range(QUARTERS):
        inside = quarter == number
        if inside.any():
            yield {
                "low": float(values[inside].min()),
                "high": float(values[inside].max()),
                "pairs": int(inside.sum()),
                "cosine": float(cosine[inside].mean()),
                "ideal": float(ideal[inside].mean()),
            }


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, ties at their average."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[which], dtype=np.float64)


def _take(columns: Columns, names: Sequence[str], rows: Sequence[int]) -> dict[str, Floats]:
    """Some rows of some columns; nan where a number is missing."""
    return {name: np.array([columns[name][row] for row in rows], dtype=np.float64) for name in names}
