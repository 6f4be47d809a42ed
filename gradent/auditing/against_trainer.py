"""An audit held against the trainer's own log: whether the model, reference and texts measured are those of the run.

A DPO-like trainer logs means over its batches of `log π` (`logps/*`) and of `β (log π - log π_ref)` (`rewards/*`).
`logps - rewards/β` is the reference's mean log-prob, which no step changes: its mean over the log is that of the run's
own reference. Where it is further from what the audit measured than chance, dropout and dtype can explain, another
function was trained than is measured.

Letters: E entries of the log, P measured pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradent.auditing.analysis.columns import TargetRecord
from gradent.auditing.state.targets import AuditPlan
from gradent.errors import GradentError
from gradent.loading.runs.trainer_log import Coverage, read_coverage, read_history
from gradent.loading.training_args import Trained, read_trained
from gradent.losses import Loss
from gradent.record.table import Floats

__all__ = ["compare_with_trainer"]

_SIDES = ("chosen", "rejected")
_FLOOR = 0.03  # share of a mean log-prob that dtype, dropout and uneven batches may make
_NATS = 0.5  # and nats, where the mean is near 0
_ERRORS = 4.0  # standard errors that chance may make
_NEAR = 5  # entries on either side of a checkpoint that its log-probs are held against
_FEWEST = 4  # entries of the log below which nothing is said


@dataclass(frozen=True, kw_only=True)
class _Gap:
    """One side's mean log-prob, by the log and as measured."""

    logged: float
    measured: float
    allowed: float  # how far apart they may be

    @property
    def is_open(self) -> bool:
        return abs(self.logged - self.measured) > self.allowed


def compare_with_trainer(plan: AuditPlan, records: Sequence[TargetRecord], loss: Loss) -> str | None:
    """What to say where the trainer's log contradicts the audit; None where it does not, or cannot be compared."""
    if plan.run is None or plan.run.history is None or not records:
        return None
    try:
        curves = read_history(plan.run.history).curves
        coverage = read_coverage(plan.run.history)
    except GradentError:  # told where the curves are read
        return None
    policy = _compare_policy(records, curves, coverage)
    # Of another β nothing is known by the log: without the run's own, its reference is not compared.
    beta = _trained(plan).beta
    gaps = _compare_reference(plan, records[0], curves, coverage, beta) if loss.needs_reference and beta else {}
    if _is_open(gaps):
        what = f"the reference's (logps/* less rewards/* over β = {beta:g}, over the whole log)"
        apart = min(abs(gap.logged - gap.measured) for gap in gaps.values())
        is_right = policy is not None and all(not gap.is_open and gap.allowed < apart / 2 for gap in policy.values())
        causes = _causes(plan, curves, coverage, gaps, is_policy_right=is_right)
        return _write(what, gaps, causes)
    if policy is not None and _is_open(policy):
        return _write("the policy's near a checkpoint (logps/*)", policy, _causes(plan, curves, coverage, {}))
    return None


def _trained(plan: AuditPlan) -> Trained:
    """What the run's files say of its training."""
    run = plan.run
    return read_trained([] if run is None else [str(run.directory), *(str(each.path) for each in run.checkpoints)])


def _compare_reference(
    plan: AuditPlan, record: TargetRecord, curves: Mapping[str, Any], coverage: Coverage, beta: float
) -> dict[str, _Gap]:
    """The reference's mean log-probs by the log and as measured; empty where they cannot be compared."""
    gaps = {}
    for side in _SIDES:
        logps, rewards = dict(curves.get(f"logps/{side}", ())), dict(curves.get(f"rewards/{side}", ()))
        steps = sorted(logps.keys() & rewards.keys())
        logged = np.array([logps[step] - rewards[step] / beta for step in steps])
        measured = record.table[f"ref_{side}_logp"]
        if len(steps) < _FEWEST or len(measured) < 2 or not np.isfinite(measured).all():
            return {}
        if np.abs(logged).max() < 1e-3 * np.abs(list(logps.values())).max():  # rewards without a reference: β log π
            return {}
        lengths = record.table[f"{side}_len"]
        sampling = 0.0 if _is_same(plan, coverage, steps) else _sampling(logged, measured, plan, record, coverage)
        gaps[side] = _nearest(float(logged.mean()), measured, lengths, sampling)
    return gaps


def _compare_policy(
    records: Sequence[TargetRecord], curves: Mapping[str, Any], coverage: Coverage
) -> dict[str, _Gap] | None:
    """The policy's mean log-probs about the checkpoint that is furthest off; None where the log says too little."""
    found = [each for each in (_policy_gaps(record, curves, coverage) for record in records) if each is not None]
    return max(found, key=_excess, default=None)


def _excess(gaps: Mapping[str, _Gap]) -> float:
    return max(abs(gap.logged - gap.measured) / gap.allowed for gap in gaps.values())


def _policy_gaps(record: TargetRecord, curves: Mapping[str, Any], coverage: Coverage) -> dict[str, _Gap] | None:
    """One checkpoint's log-probs against a line through what was logged about its step."""
    gaps = {}
    for side in _SIDES:
        measured = record.table[f"{side}_logp"]
        if len(measured) < 2 or record.target.step == 0:
            return None
        spread = float(np.std(measured, ddof=1))
        expected = _expected(curves.get(f"logps/{side}", ()), record.target.step, spread, coverage.batch)
        if expected is None:
            return None
        logged, error = expected
        sampling = math.hypot(error, _ERRORS * spread / math.sqrt(len(measured)))
        gaps[side] = _nearest(logged, measured, record.table[f"{side}_len"], sampling)
    return gaps


def _expected(
    points: Sequence[tuple[int, float]], step: int, spread: float, batch: int | None
) -> tuple[float, float] | None:
    """What a log leads one to expect after a step, and how far chance and a bent curve may move that."""
    if len(points) < 2:
        return None
    steps, logged = np.array([at for at, _ in points], float), np.array([value for _, value in points])
    # An entry is the mean over the steps since the one before it, each taken before the optimizer's.
    since = np.diff(steps, prepend=max(0.0, 2 * steps[0] - steps[1]))
    done = steps - (since + 1) / 2 - step
    before, after = np.flatnonzero(done <= 0)[-_NEAR:], np.flatnonzero(done > 0)[:_NEAR]
    at, values = done[[*before, *after]], logged[[*before, *after]]
    if len(before) < 3 or len(at) < _FEWEST:
        return None
    slope, level = np.polyfit(at, values, 1)
    bend = abs(float(np.polyfit(at, values, 2)[-1]) - level)
    free = len(at) - 2
    scatter = math.sqrt(float(((values - level - slope * at) ** 2).sum()) / free)
    scatter = max(scatter, spread / math.sqrt(max(1, batch or 1)))
    lever = 1 / len(at) + float(at.mean()) ** 2 / float(((at - at.mean()) ** 2).sum())
    return float(level), _ERRORS * (1 + 3 / free) * scatter * math.sqrt(lever) + 2 * bend


def _nearest(logged: float, measured: Floats, lengths: Floats, sampling: float) -> _Gap:
    """A gap of sums over tokens or, for trainers that log means over tokens, of these: the nearer one."""
    found = []
    for values, share in ((measured, 1.0), (measured / np.maximum(lengths, 1), 1 / float(lengths.mean()))):
        mean = float(values.mean())
        allowed = share * (sampling + _NATS) + _FLOOR * abs(mean)
        found.append(_Gap(logged=logged, measured=mean, allowed=allowed))
    return found[1] if found[0].is_open and not found[1].is_open else found[0]


def _is_same(plan: AuditPlan, coverage: Coverage, steps: Sequence[int]) -> bool:
    """Whether the log's entries are, all alike, over exactly the pairs that were measured."""
    pairs, epochs = len(plan.pairs), coverage.epochs
    if pairs != plan.material.rows or epochs is None or coverage.batch is None or not coverage.steps:
        return False
    seen = pairs * round(epochs)
    each = coverage.steps * coverage.batch
    is_whole = round(epochs) >= 1 and abs(epochs - round(epochs)) < 1e-6 and seen % each == 0
    if not is_whole or steps[-1] != coverage.steps or coverage.steps % len(steps):
        return False
    tokens = _tokens(plan) * round(epochs)
    return seen == each or coverage.tokens is None or coverage.tokens == tokens


def _tokens(plan: AuditPlan) -> int:
    return sum(pair.tokens for pair in plan.pairs)


def _sampling(logged: Floats, measured: Floats, plan: AuditPlan, record: TargetRecord, coverage: Coverage) -> float:
    """How far chance may move two means apart, over different pairs of one kind."""
    entries, pairs = len(logged), len(measured)
    variance = float(np.var(measured, ddof=1))
    # Measured pairs are one of each of so many slices of like length, so they differ from the data's mean by less.
    by_length = np.argsort(record.table["chosen_len"] + record.table["rejected_len"], kind="stable")
    within = float((np.diff(measured[by_length]) ** 2).sum()) / (2 * (pairs - 1))
    rows = max(plan.material.rows, pairs)
    drawn = variance / rows + (min(within, variance) / pairs if rows > pairs else 0.0)
    trained = max(float(np.var(logged, ddof=1)), variance / max(1, coverage.batch or 1)) / entries
    return _ERRORS * (1 + 3 / (entries - 1)) * math.sqrt(drawn + trained)


def _is_open(gaps: Mapping[str, _Gap]) -> bool:
    return any(gap.is_open for gap in gaps.values())


def _causes(
    plan: AuditPlan, curves: Mapping[str, Any], coverage: Coverage, gaps: Mapping[str, _Gap], *,
    is_policy_right: bool = False,
) -> list[str]:  # fmt: skip
    """What may be behind it, the likeliest first, each with the option that tells gradent."""
    is_adapter = plan.run is not None and plan.run.kind == "adapter"
    model = ["another base than the files name (--base DIR)"]
    if is_adapter:
        model = [
            "a merge that the adapter was trained on and that was never saved (--base DIR, with the merged model)",
            "a base that was quantized while it was loaded (--quantize nf4, or whichever it was)",
        ]
    reference = ["another reference (--reference DIR)"]
    beta = _other_beta(curves, gaps)
    if beta is not None:
        reference.insert(0, f"another β: with --beta {beta:.3g} the two would agree")
    text = [
        "another chat template or tokenizer (put the run's into its checkpoints)",
        "another truncation (--max-length, --truncation-mode)",
        "other data than the run's (--data)",
    ]
    if any(pair.truncated for pair in plan.pairs):
        text = [text[1], text[0], text[2]]
    ordered = [*model, *reference, *text]
    if beta is not None or is_policy_right:
        ordered = [*reference, *model, *text]
    elif coverage.tokens and coverage.epochs and len(plan.pairs) == plan.material.rows:
        logged, here = coverage.tokens / coverage.epochs, _tokens(plan)
        if abs(logged - here) > 0.01 * here:
            counted = f"the log counts {logged:,.0f} tokens an epoch, and here the pairs have {here:,}: "
            ordered = [counted + text[0], *text[1:], *model, *reference]
    limits, how = _trained(plan).limits, plan.material.how
    options = {"max_length": plan.material.max_length, "truncation_mode": how.truncation_mode}
    other = {name: limits[name] for name, value in options.items() if limits.get(name) not in (None, value)}
    longest = max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in plan.pairs)
    if other and (any(pair.truncated for pair in plan.pairs) or longest > (limits.get("max_length") or longest)):
        said = " and ".join(f"{name}={value!r}" for name, value in other.items())
        told = f"another truncation: the run's training_args.bin says {said}, and here it is not so (leave it out)"
        ordered = [told, *(cause for cause in ordered if not cause.startswith("another truncation"))]
    return [*ordered, "a dtype in which this model is far off (--dtype)"]


def _other_beta(curves: Mapping[str, Any], gaps: Mapping[str, _Gap]) -> float | None:
    """The β with which both sides would agree, if there is one."""
    found = []
    for side, gap in gaps.items():
        logps = np.mean([value for _, value in curves[f"logps/{side}"]])
        rewards = np.mean([value for _, value in curves[f"rewards/{side}"]])
        found.append(float(rewards / (logps - gap.measured)) if logps != gap.measured else 0.0)
    if len(found) < 2 or min(found) <= 0 or max(found) > 1.1 * min(found):
        return None
    return float(np.mean(found))


def _write(what: str, gaps: Mapping[str, _Gap], causes: Sequence[str]) -> str:
    sides = " and ".join(f"{gap.logged:,.1f} on {side} ({gap.measured:,.1f} here)" for side, gap in gaps.items())
    numbered = "; ".join(f"{number}. {cause}" for number, cause in enumerate(causes, 1))
    return (
        f"The trainer's log contradicts this audit: by the log, mean log-probs of {what} are {sides}, which sampling, "
        "dropout and dtype cannot explain, so what was trained is not what is measured here. Likely causes, in order: "
        f"{numbered}."
    )
