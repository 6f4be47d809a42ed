"""Which properties of a pair go with its entanglement: edit distance, shared tokens, lengths and log-probs.

The paper's Section 4 finds that responses which share tokens have gradients which point the same way; whether that
holds for a data set at hand is a rank correlation away. Ids and numbers in, numbers out: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein, Postfix, Prefix

from gradent.record.table import Floats, Table, ranks, spearman

__all__ = ["FEWEST", "pair_properties", "rank_correlation", "summarize_properties"]

FEWEST = 10
"""Pairs below which nothing is said of a property."""

QUARTERS = 4
_NORMAL_95 = 1.959963984540054
_IDEAL = 1


def pair_properties(chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> dict[str, int]:
    """What the tokens of two responses have in common."""
    chosen, rejected = list(chosen_ids), list(rejected_ids)
    prefix = Prefix.similarity(chosen, rejected)
    suffix = Postfix.similarity(chosen[prefix:], rejected[prefix:])
    return {
        "shared_prefix": prefix, "shared_suffix": suffix, "edit_distance": int(Levenshtein.distance(chosen, rejected)),
    }  # fmt: skip


def summarize_properties(pairs: Mapping[str, Any], sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How each property goes with the cosine of a pair's gradients, over the pairs whose cosine is defined."""
    rows, texts = Table.read(pairs), Table.read(sample)
    rows = rows.select(np.isfinite(rows["cosine"]))
    places = {pair: place for place, pair in enumerate(texts["pair"].tolist())}
    texts = texts.select(np.array([places[pair] for pair in rows["pair"].tolist()], dtype=np.int64))
    ideal = rows["case"] == _IDEAL
    summaries = [_summarize(*description, rows["cosine"], ideal) for description in _properties(rows, texts)]
    return sorted(summaries, key=lambda row: (row["spearman"] is None, -abs(row["spearman"] or 0.0)))


def rank_correlation(x: Floats, y: Floats) -> tuple[float, float | None, float | None] | None:
    """Spearman's ρ of x and y, `[n]` each, and its 95% interval; None where one of them is constant or empty."""
    rho = spearman(x, y)
    if rho is None:
        return None
    if len(x) <= 3 or math.isclose(abs(rho), 1, abs_tol=1e-12):
        return rho, None, None
    # Fisher's interval, with the variance (1 + ρ²/2)/(n - 3) of Bonett and Wright (2000).
    centre, reach = math.atanh(rho), _NORMAL_95 * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return rho, math.tanh(centre - reach), math.tanh(centre + reach)


def _properties(rows: Table, texts: Table) -> list[tuple[str, str, str, Floats]]:
    """Name, label, unit and values `[n]` of each property of the pairs."""
    longer = np.maximum(texts["chosen_len"], texts["rejected_len"])
    shorter = np.minimum(texts["chosen_len"], texts["rejected_len"])
    chosen = rows["chosen_logp"] / rows["chosen_len"]
    rejected = rows["rejected_logp"] / rows["rejected_len"]
    of_longer, of_shorter = (f"share of the {which} response's tokens" for which in ("longer", "shorter"))
    ratio = rows["chosen_len"] / rows["rejected_len"]
    length = (rows["chosen_len"] + rows["rejected_len"]).astype(np.float64)
    margin = rows["chosen_logp"] - rows["ref_chosen_logp"] - (rows["rejected_logp"] - rows["ref_rejected_logp"])
    averaged = "nats a token, each response averaged over its own"
    properties = [
        ("edit_distance", "Edit distance", of_longer, texts["edit_distance"] / longer),
        ("shared_prefix", "Shared beginning", of_shorter, texts["shared_prefix"] / shorter),
        ("shared_suffix", "Shared end", of_shorter, texts["shared_suffix"] / shorter),
        ("length_ratio", "Length ratio", "chosen tokens for each rejected token", ratio),
        ("length", "Length of both responses", "tokens", length),
        ("chosen_logp", "Log-prob of chosen", "nats a token", chosen),
        ("rejected_logp", "Log-prob of rejected", "nats a token", rejected),
        ("margin", "Margin log π(y_w) - log π(y_l)", averaged, chosen - rejected),
    ]  # fmt: skip
    if np.isfinite(margin).any():
        summed = "nats, summed over the responses"
        properties.append(("reference_margin", "Margin against the reference", summed, margin))
    return properties


def _summarize(
    name: str, label: str, unit: str, values: Floats, cosine: Floats, ideal: NDArray[np.bool_]
) -> dict[str, Any]:
    defined = np.isfinite(values)
    values, cosine, ideal = values[defined], cosine[defined], ideal[defined]
    correlation, reason = None, None
    if len(values) < FEWEST:
        reason = f"fewer than {FEWEST} pairs"
    else:
        correlation = rank_correlation(values, cosine)
        if correlation is None:
            reason = f"{'the property' if np.ptp(values) == 0 else 'the cosine'} is the same for all pairs"
    rho, low, high = correlation or (None, None, None)
    return {
        "property": name, "label": label, "unit": unit,
        "spearman": rho, "low": low, "high": high,  # and its interval
        "reason": reason,  # why there is no correlation
        "pairs": len(values),
        "groups": list(_groups(values, cosine, ideal)) if len(values) >= FEWEST else [],
    }  # fmt: skip


def _groups(values: Floats, cosine: Floats, ideal: NDArray[np.bool_]) -> Iterator[dict[str, Any]]:
    """Quarters by rank, ties together."""
    quarter = np.floor(QUARTERS * (ranks(values) - 0.5) / len(values))
    for number in range(QUARTERS):
        inside = quarter == number
        if inside.any():
            yield {
                "low": float(values[inside].min()), "high": float(values[inside].max()), "pairs": int(inside.sum()),
                "cosine": float(cosine[inside].mean()), "ideal": float(ideal[inside].mean()),
            }  # fmt: skip
