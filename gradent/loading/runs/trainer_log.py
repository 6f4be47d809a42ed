"""What the trainer logged while a run went on: curves from the `log_history` of a trainer_state.json."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradent.loading.files import read_object, some
from gradent.text import quoted

__all__ = ["Coverage", "History", "read_coverage", "read_history"]

_TRAINED = (
    "loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class History:
    """The curves of a run."""

    source: str  # the file, with the name of the checkpoint it stands in
    # of each key that was logged, (step, value) by step; finite numbers only
    curves: dict[str, list[tuple[int, float]]]
    problems: list[str]  # what could not be read, counted


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much data a log speaks of."""

    steps: int | None  # steps of the optimizer when it was written
    batch: int | None  # rows of a batch on one device
    epochs: float | None  # passes over the data, of the last entry that has log-probs
    tokens: int | None  # tokens of prompts and responses that the trainer counted by then


def read_coverage(path: str | os.PathLike[str]) -> Coverage:
    """Read how many steps, rows and tokens a trainer's log covers."""
    content = read_object(Path(path))
    log = content.get("log_history")
    entries = [entry for _, entry in _entries(log if isinstance(log, list) else [], Counter())]
    last: Mapping[str, Any] = next((entry for entry in reversed(entries) if "logps/chosen" in entry), {})
    epochs, tokens = _finite(last.get("epoch")), _finite(last.get("num_tokens"))
    return Coverage(
        steps=_count(content.get("global_step")), batch=_count(content.get("train_batch_size")), epochs=epochs,
        tokens=None if tokens is None else round(tokens),
    )  # fmt: skip


def read_history(path: str | os.PathLike[str]) -> History:
    """Read the losses, log-probs, rewards and entanglement that a trainer logged."""
    # Kept are TRL's `loss`, `logps/*` and `rewards/*`, the same of evaluations (`eval_loss`, and `eval_NAME_loss` where
    # there were several), `learning_rate`, and what gradent's own callback logged (`gradent/*`). Where a step was
    # logged twice, as by a run that was taken up again, the later entry holds.
    path = Path(path)
    log = read_object(path).get("log_history")
    source = f"{path.parent.name}/{path.name}" if path.parent.name.startswith("checkpoint-") else path.name
    if not isinstance(log, list):
        held = "has no log_history" if log is None else f"its log_history is a {type(log).__name__}, not a list"
        problem = f"{path}: {held}, so there are no curves of the trainer. Was it written by a transformers trainer?"
        return History(source=source, curves={}, problems=[problem])
    odd: Counter[str] = Counter()
    points: dict[str, dict[int, float]] = {}
    for step, entry in _entries(log, odd):
        for key, value in entry.items():
            if not _is_kept(key):
                continue
            points.setdefault(key, {}).pop(step, None)  # what was logged of this step before
            if (number := _finite(value)) is None:
                odd[f"{quoted(key)} is no finite number"] += 1
            else:
                points[key][step] = number
    curves = {key: sorted(curve.items()) for key, curve in sorted(points.items()) if curve}
    return History(source=source, curves=curves, problems=_problems(path, odd, curves, len(log)))


def _entries(log: list[Any], odd: Counter[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """What was logged, with its step; entries without one are counted."""
    for entry in log:
        step = entry.get("step") if isinstance(entry, dict) else None
        if not isinstance(entry, dict):
            odd["entry that is no object"] += 1
        elif not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**18:
            odd["entry whose step is no whole number"] += 1
        else:
            yield step, entry


def _is_kept(key: str) -> bool:
    if key.startswith("eval_"):
        return any(key.endswith(f"_{name}") for name in _TRAINED)
    return key in _TRAINED or key == "learning_rate" or key.startswith("gradent/")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**18 else None


def _finite(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def _problems(path: Path, odd: Counter[str], curves: Mapping[str, Any], lines: int) -> list[str]:
    problems = []
    if odd:
        counted = [f"{count} times: {what}" for what, count in odd.most_common()]
        problems.append(f"{path}: {sum(odd.values())} values are left out of the curves. {some(counted, 5)}.")
    if not curves:
        problems.append(
            f"{path}: none of its {lines} log entries holds a loss, a log-prob or a reward, so there are no curves of "
            "the trainer. Was logging switched off (logging_steps, logging_strategy)?"
        )
    return problems
