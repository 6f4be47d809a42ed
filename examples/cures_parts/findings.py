"""What the figures of one data and optimizer say, in sentences that are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

__all__ = ["Group", "RunRows"]

Row = dict[str, Any]
CEILING = 97.0
"""Percent of right labels above which hardly any are left to gain."""
LOST = 0.02
"""A share of statements whose loss is told of: less than this is one statement or none of a probe of 48."""
SAME = 0.05
"""Chosen changes as DPO's does where the two changes differ by no more than this part of DPO's."""
NEAR = 1.5
"""A margin's gain within this factor of DPO's is called the same separation."""

_ACCURACY = {
    "costs": "**It costs accuracy** ({}) against DPO, by more than two standard errors of DPO's,",
    "below": "Its accuracy ({}) ends below DPO's, by less than two standard errors of DPO's,",
    "gains": "It gains accuracy ({}) against DPO, by more than two standard errors of DPO's,",
}


@dataclass(frozen=True)
class RunRows:
    """A run: its rows, from the first step to the last."""

    style: str
    seed: float
    rows: list[Row]

    @property
    def last(self) -> Row:
        """The row of the last step."""
        return self.rows[-1]

    def change(self, name: str) -> float:
        """Last step minus first.

        Args:
            name: a figure.

        Returns:
            The difference.
        """
        return float(self.rows[-1][name] - self.rows[0][name])

    @property
    def gain(self) -> float:
        """Of the margin, nats."""
        return self.change("chosen") - self.change("rejected")

    @property
    def cosine(self) -> float:
        """Mean over the measured steps."""
        return fmean(row["cosine"] for row in self.rows)


class Group:
    """All runs of one data and optimizer.

    Args:
        rows: of `records.COLUMNS`.
        data: which data.
        optimizer: which optimizer.
        probe: held-out statements of a seed.
    """

    def __init__(self, rows: Sequence[Row], data: str, optimizer: str, probe: int) -> None:
        self.data, self.optimizer, self._probe = data, optimizer, probe
        mine = [row for row in rows if (row["data"], row["optimizer"]) == (data, optimizer)]
        self._tuning = [row for row in mine if row["phase"] == "rate"]
        self._tried = [row for row in mine if row["phase"] == "masks"]
        reported = [row for row in mine if row["phase"] == "run"]
        self.methods = list(dict.fromkeys(row["method"] for row in reported))
        self.styles = list(dict.fromkeys(row["style"] for row in reported))
        self._runs: dict[tuple[str, str, float], list[Row]] = {}
        for row in reported:
            self._runs.setdefault((row["method"], row["style"], row["seed"]), []).append(row)

    def runs(self, method: str, style: str | None = None) -> list[RunRows]:
        """The runs of a method.

        Args:
            method: which.
            style: in this style only.

        Returns:
            One a style and seed.
        """
        return [
            RunRows(where, seed, rows)
            for (name, where, seed), rows in self._runs.items()
            if name == method and style in (None, where)
        ]

    def run(self, method: str, style: str, seed: float) -> RunRows:
        """One run.

        Args:
            method: its method.
            style: its style.
            seed: its seed.

        Returns:
            The run.
        """
        return RunRows(style, seed, self._runs[method, style, seed])

    def tuned(self, method: str, style: str) -> tuple[float, float]:
        """A learning rate and what it did on the tuning seed.

        Args:
            method: which method.
            style: which style.

        Returns:
            `(rate, gain of the margin in parts of DPO's)`.
        """
        rate = self.runs(method, style)[0].last["rate"]

        def gain(name: str, at: float) -> float:
            first, last = (
                row["chosen"] - row["rejected"]
                for row in self._tuning
                if (row["method"], row["style"]) == (name, style) and math.isclose(row["rate"], at, rel_tol=1e-4)
            )
            return float(last - first)

        return rate, gain(method, rate) / gain("DPO", self.runs("DPO", style)[0].last["rate"])

    def masks_tried(self) -> list[tuple[Row, float, float]]:
        """The mask settings of the tuning seed.

        Returns:
            `(last row, change of chosen, gain of the margin)` of each; its `kept_*` and `mask_*` are in the row.
        """
        found: dict[tuple[float, float], list[Row]] = {}
        for row in self._tried:
            found.setdefault((row["mask_eta"], row["mask_learning_rate"]), []).append(row)
        tried = [RunRows(rows[0]["style"], rows[0]["seed"], rows) for rows in found.values()]
        return [(run.last, run.change("chosen"), run.gain) for run in tried]

    def sentences(self) -> list[str]:
        """What is found.

        Returns:
            One sentence or two each.
        """
        found = [self._dpo()]
        found += [self._cure(method) for method in self.methods if method != "DPO"]
        return [*found, self._masks(), self._ceiling(), self._separation()]

    def _dpo(self) -> str:
        falls = {style: sum(run.change("chosen") < 0 for run in self.runs("DPO", style)) for style in self.styles}
        seeds = len(self.runs("DPO", self.styles[0]))
        listed = ", ".join(f"{style} {count} of {seeds}" for style, count in falls.items())
        return f"**DPO's chosen falls** in {sum(falls.values())} of {seeds * len(falls)} runs ({listed})."

    def against(self, run: RunRows) -> int:
        """How chosen changes in a run, held against DPO's change in the same style and seed.

        Args:
            run: a run of any method.

        Returns:
            1 where it ends higher by more than `SAME` of DPO's change, -1 where lower by more than that, 0 between.
        """
        dpo = self.run("DPO", run.style, run.seed).change("chosen")
        return _compare(run.change("chosen"), dpo)

    def _cure(self, method: str) -> str:
        fallen, rest = [], []
        for run in self.runs(method):
            dpo = self.run("DPO", run.style, run.seed)
            (fallen if dpo.change("chosen") < 0 else rest).append(run)
        text = f"**{method}**: "
        if fallen:
            rises = sum(run.change("chosen") > 0 for run in fallen)
            fell = [self.against(run) for run in fallen if run.change("chosen") <= 0]
            text += f"where DPO's chosen falls, chosen rises in {rises} of {len(fallen)} runs"
            text += f", falls by less in {fell.count(1)}, by as much in {fell.count(0)}, by more in {fell.count(-1)}."
        if rest:
            how = [self.against(run) for run in rest]
            text += f" Where DPO's does not fall, it ends higher than DPO's in {how.count(1)} of {len(rest)} runs, "
            text += f"as high in {how.count(0)}, lower in {how.count(-1)}"
            down = sum(run.change("chosen") < 0 for run in rest)
            text += f" (falling in {down})." if down else "."
        return text + self._no_help(method) + self._costs(method)

    def _mean(self, method: str, style: str, name: str) -> float:
        return fmean(run.change(name) for run in self.runs(method, style))

    def _no_help(self, method: str) -> str:
        worse = [
            f"{style} ({self._mean(method, style, 'chosen'):+.2f}, DPO {self._mean('DPO', style, 'chosen'):+.2f})"
            for style in self.styles
            if _compare(self._mean(method, style, "chosen"), self._mean("DPO", style, "chosen")) < 1
        ]
        return f" **It does not help** chosen, on average over the seeds, in {'; '.join(worse)}." if worse else ""

    def _share(self, method: str, style: str, name: str, at: int) -> float:
        return fmean(run.rows[at][name] for run in self.runs(method, style))

    def _error(self, share: float, style: str) -> float:
        """Standard error of a share over the statements of all seeds."""
        return math.sqrt(share * (1 - share) / (self._probe * len(self.runs("DPO", style))))

    def _costs(self, method: str) -> str:
        text = ""
        for name, what in (("label_right", "right labels"), ("preferred", "preferred")):
            told: dict[str, list[str]] = {"costs": [], "below": [], "gains": []}
            for style in self.styles:
                start, end, dpo = (
                    self._share(*each, name, at)
                    for *each, at in ((method, style, 0), (method, style, -1), ("DPO", style, -1))
                )
                far = abs(end - dpo) > 2 * self._error(dpo, style)
                if abs(end - dpo) > LOST and (far or end < dpo):
                    key = "gains" if end > dpo else "costs" if far else "below"
                    told[key].append(f"{style} ({100 * end:.0f}%; DPO {100 * dpo:.0f}%, start {100 * start:.0f}%)")
            for key, words in _ACCURACY.items():
                if told[key]:
                    text += f" {words.format(what)} in {'; '.join(told[key])}."
        gap = {
            style: self._mean(method, style, "answers") - self._mean("DPO", style, "answers") for style in self.styles
        }
        forgets = [f"{style} {value:+.2f}" for style, value in gap.items() if value < -0.1]
        if forgets:
            text += f" It forgets more of SFT's answers than DPO does (nats an answer): {', '.join(forgets)}."
        return text

    def _ceiling(self) -> str:
        ends = [100 * fmean(run.last["label_right"] for run in self.runs(method)) for method in self.methods]
        start = 100 * fmean(run.rows[0]["label_right"] for run in self.runs("DPO"))
        text = (
            f"**Right labels** are at {start:.1f}% before the first step, and at {min(ends):.1f} to {max(ends):.1f}% "
        )
        text += "at the end, by method."
        error = max(self._error(self._share("DPO", style, "label_right", -1), style) for style in self.styles)
        text += f" The standard error of such a share in one style is at most {100 * error:.1f} points."
        return text + (" This data cannot show a gain of accuracy." if start >= CEILING else "")

    def _masks(self) -> str:
        runs = self.runs("masked")
        used = runs[0].last

        def share(name: str) -> str:
            values = [run.last[name] for run in runs if not math.isnan(run.last[name])]
            return f"{100 * fmean(values):.0f}%" if values else "none there"

        return (
            f"**The masks** (η = {used['mask_eta']:g}, head's rate {used['mask_learning_rate']:g}) keep, at the end, "
            f"{share('kept_label')} of the differing label tokens and {share('kept_shared')} of the tokens that chosen "
            f"and rejected share: {share('kept_chosen')} of chosen's and {share('kept_rejected')} of rejected's."
            f"{self._picked()}"
        )

    def _picked(self) -> str:
        tried = self.masks_tried()
        picked = [row for row, _, _ in tried if row["kept_label"] > row["kept_shared"]]
        if not tried:
            return ""
        return (
            f" Of {len(tried)} settings tried on the tuning seed, {len(picked)} kept more of the label tokens than of "
            "the shared ones."
        )

    def apart(self) -> list[tuple[str, str, float]]:
        """Where methods are not compared at DPO's separation.

        Returns:
            `(method, style, its mean gain of the margin in parts of DPO's)` of those beyond a factor of `NEAR`.
        """
        found = []
        for method in self.methods[1:]:
            for style in self.styles:
                ratio = fmean(run.gain for run in self.runs(method, style)) / fmean(
                    run.gain for run in self.runs("DPO", style)
                )
                if not 1 / NEAR <= ratio <= NEAR:
                    found.append((method, style, ratio))
        return found

    def _separation(self) -> str:
        apart = [f"{method} in {style} ({ratio:.2f} of DPO's)" for method, style, ratio in self.apart()]
        if not apart:
            return f"All methods gain, on average, DPO's margin to within a factor of {NEAR:g}."
        return (
            f"**Not at the same separation** (the mean gain of the margin is not within a factor of {NEAR:g} of "
            f"DPO's): {', '.join(apart)}."
        )


def _compare(change: float, dpo: float) -> int:
    gap = change - dpo
    return 0 if abs(gap) <= SAME * abs(dpo) else 1 if gap > 0 else -1
