"""Numbers as text. What does not exist (None, nan) is a dash, everywhere the same one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "NOTHING",
    "all_pairs",
    "beats_a_coin",
    "change",
    "count",
    "describe_evidence",
    "fixed",
    "number",
    "percent",
    "plural",
    "share_interval",
    "share_of_pairs",
    "signed_number",
    "step_name",
]  # fmt: skip

NOTHING = "-"
_Z = 1.959964  # of a 95% interval


def number(value: float | None) -> str:
    """A number to three digits."""
    if value is None or math.isnan(value):
        return NOTHING
    if not (value and 1e-3 <= abs(value) < 1e6):
        return f"{value:.3g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def signed_number(value: float | None) -> str:
    """A number to three digits with its sign, for what can be of either."""
    text = number(value)
    return text if text == NOTHING or text.startswith("-") else f"+{text}"


def fixed(value: float | None) -> str:
    """A number between -1 and 1, to three decimals with its sign: a cosine, a correlation, a part of one."""
    if value is None or math.isnan(value):
        return NOTHING
    text = f"{value:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text


def percent(value: float | None) -> str:
    """A share of 1 as percent."""
    return NOTHING if value is None or math.isnan(value) else f"{100 * value:.1f}%"


def share_interval(share: float, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of that many pairs."""
    square, middle = _Z**2 / total, share + _Z**2 / (2 * total)
    half = _Z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def beats_a_coin(share: float, total: int) -> bool:
    """Whether a share of that many is clearly more than a half."""
    return share_interval(share, total)[0] > 0.5


def share_of_pairs(share: float | None, total: int) -> str:
    """A share of pairs as whole percent with its 95% interval, such as "79% [71, 86]"."""
    if share is None or math.isnan(share) or total < 1:
        return NOTHING
    low, high = share_interval(share, total)
    shown = (
        "under 1%" if 0 < share < 0.005 else "over 99%" if 0.995 < share < 1 else f"{math.floor(100 * share + 0.5)}%"
    )
    return f"{shown} [{math.floor(100 * low + 0.5)}, {math.floor(100 * high + 0.5)}]"


def count(value: float | None) -> str:
    """A whole number."""
    return NOTHING if value is None or math.isnan(value) else f"{value:,.0f}"


def change(first: float | None, last: float | None, error: float | None = None) -> str:
    """The way from one number to another."""
    if first is None or last is None or math.isnan(first) or math.isnan(last):
        return NOTHING
    spread = "" if error is None or not math.isfinite(error) else f" ± {number(error)}"
    return signed_number(last - first) + spread


def plural(amount: int, noun: str) -> str:
    """A number of things."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def all_pairs(amount: int) -> str:
    """A whole sample in words."""
    return "the only pair" if amount == 1 else f"all {plural(amount, 'pair')}"


def step_name(step: float | None) -> str:
    """A training step in words."""
    return "an unknown step" if step is None else f"step {step:,.0f}"


def describe_evidence(evidence: Mapping[str, Any]) -> str:
    """One measured mean as text."""
    mean, error = evidence["mean"], evidence["error"]
    value = "no value" if mean is None else f"{mean:+.3f}"
    return f"{evidence['label']}: {value}" + ("" if error is None else f" ± {error:.3f}")
