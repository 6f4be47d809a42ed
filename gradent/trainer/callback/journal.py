"""What becomes of measured steps: records, scalars, words, panels and lines of a file; of pairs, and of groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from gradent.attribution.step import StepAttribution
from gradent.record.stream import PairStream, RowStream
from gradent.recorder.recording import Recording, RowRecording, join_recordings, join_row_recordings
from gradent.report.live.alerts import FIRST_TOLD, Alert, Alerter
from gradent.report.live.closing import GroupTally, PairTally
from gradent.report.live.group_alerts import GroupAlerter
from gradent.report.live.group_panels import GroupPanels
from gradent.report.live.group_window import GroupWindow
from gradent.report.live.shown import with_totals
from gradent.report.live.wandb import Panels
from gradent.report.live.window import Window
from gradent.theory.conditions import CASES
from gradent.trainer.records.row_step import SIDES, RowStepRecord, summarize_rows, to_row_lines
from gradent.trainer.records.row_window import to_group_window
from gradent.trainer.records.step import StepRecord, layer_cosines, summarize, to_rows
from gradent.trainer.records.token_map import TokenMap
from gradent.trainer.records.window import to_window

__all__ = ["GroupJournal", "Journal", "PairJournal", "same_kind"]


class Journal(ABC):
    """What becomes of the measured steps of a run; a kind of rows says how records, scalars and windows are made."""

    def __init__(
        self, alert: Alert | None, alerter: Alerter | GroupAlerter | None, panels: Panels | GroupPanels | None,
        tally: PairTally | GroupTally,
    ) -> None:  # fmt: skip
        # Each kind's alerter and panels take the windows that it makes.
        self._alert = alert
        self._alerter: Any = alerter
        self._panels: Any = panels
        self._tally: PairTally | GroupTally = tally
        self._untold: list[Any] = []  # steps that have too few rows to say anything of them
        self._stream: PairStream | None = None

    def append(self, record: Any, out: Path | None) -> None:
        """Count a step and write its lines, from now on into a file of `out` where it is given."""
        self._count(record)
        if out is not None:
            self._stream = self._open_stream(out)
        if self._stream is not None:
            self._stream.append(self._to_lines(record))

    @property
    def has_figures(self) -> bool:
        """Whether a tracker shows figures of this run."""
        return self._panels is not None and bool(self._panels.is_drawing)

    def tell(
        self, records: Sequence[Any], scalars: Mapping[str, float], state: TrainerState, tokenizer: Any
    ) -> str | None:
        """Send a window's panels, with scalars that nobody else sends; the line for the log, None for none."""
        if self._panels is not None:
            window = self._to_window(records, tokenizer)
            self._panels.send(window, scalars, state.global_step, state.max_steps)
        if self._alerter is None or self._alert is None:
            return None
        self._untold += records
        if sum(map(self._rows_told, self._untold)) < self._alert.pairs:
            return None
        untold, self._untold = self._untold, []
        text: str | None = self._alerter.check(self._to_window(untold, None))
        return text

    def rewind(self) -> None:
        """Take every line off the file that was written since it was opened."""
        if self._stream is not None:
            self._stream.rewind()

    def finish(self) -> str:
        """Send what panels hold; the run's closing line."""
        if self._panels is not None:
            self._panels.finish(self._tally.describe())
        return self._tally.close(None if self._stream is None else self._stream.path)

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    @abstractmethod
    def record(
        self, step: int, recordings: Sequence[Any], realised: Sequence[Tensor] | None, tokens: TokenMap | None
    ) -> Any:
        """The record of a step, from what all ranks harvested, and how much their rows moved."""

    @abstractmethod
    def summarize(self, records: Sequence[Any]) -> dict[str, float]:
        """The scalars of a window of at least one step."""

    @abstractmethod
    def _count(self, record: Any) -> None:
        """Count a step for the closing line."""

    @abstractmethod
    def _rows_told(self, record: Any) -> int:
        """How many rows of a step a sentence would speak of."""

    @abstractmethod
    def _open_stream(self, out: Path) -> PairStream:
        """The file of a directory that lines go into."""

    @abstractmethod
    def _to_lines(self, record: Any) -> list[dict[str, Any]]:
        """A step's lines."""

    @abstractmethod
    def _to_window(self, records: Sequence[Any], tokenizer: Any) -> Any:
        """What alerts and panels are made from."""


class PairJournal(Journal):
    """Of pairs: `pairs.jsonl`, cases, layers."""

    def __init__(self, alert: Alert | None, *, panels: bool, by_module: bool) -> None:
        alerter = None if alert is None else Alerter(alert)
        super().__init__(alert, alerter, Panels() if panels else None, PairTally())
        self._by_module = by_module

    def record(
        self, step: int, recordings: Sequence[Recording], realised: Sequence[Tensor] | None, tokens: TokenMap | None
    ) -> StepRecord:
        """See `Journal`."""
        moved = None if realised is None else torch.cat([part.view(2, -1) for part in realised], 1)
        return StepRecord.of(step, join_recordings(recordings), realised=moved, tokens=tokens)

    def summarize(self, records: Sequence[StepRecord]) -> dict[str, float]:
        """See `Journal`."""
        layers = layer_cosines(records) if self._by_module else {}
        scalars = with_totals(summarize(records))
        return scalars | {f"gradent/layer/{name}/cosine": value for name, value in layers.items()}

    def _count(self, record: StepRecord) -> None:
        counts = {name: int((record.verdict.case == number).sum()) for number, name in CASES.items()}
        counts["inactive"] = counts.get("inactive", 0) + record.inactive
        self._tally.add(counts, *_squares(record.attribution))

    def _rows_told(self, record: StepRecord) -> int:
        return len(record.gram)

    def _open_stream(self, out: Path) -> PairStream:
        return PairStream(out / "pairs.jsonl")

    def _to_lines(self, record: StepRecord) -> list[dict[str, Any]]:
        return to_rows(record)

    def _to_window(self, records: Sequence[StepRecord], tokenizer: Any) -> Window:
        return to_window(records, tokenizer)


class GroupJournal(Journal):
    """Of rows that are no pairs: `rows.jsonl`, what moved positives and negatives, spikes."""

    def __init__(self, alert: Alert | None, *, panels: bool) -> None:
        alerter = None if alert is None else GroupAlerter(alert)
        super().__init__(alert, alerter, GroupPanels() if panels else None, GroupTally())

    def record(
        self, step: int, recordings: Sequence[RowRecording], realised: Sequence[Tensor] | None, tokens: TokenMap | None
    ) -> RowStepRecord:
        """See `Journal`."""
        moved = None if realised is None else torch.cat(list(realised))
        return RowStepRecord.of(step, join_row_recordings(recordings), realised=moved)

    def summarize(self, records: Sequence[RowStepRecord]) -> dict[str, float]:
        """See `Journal`."""
        return with_totals(summarize_rows(records))

    def _count(self, record: RowStepRecord) -> None:
        counts = {"rows": len(record.rows), "groups": record.groups}
        account = record.attribution
        if account is not None and len(record.rows):
            for name, sign in SIDES.items():
                side = record.side(sign)
                against = side & (account.total * sign < 0)
                counts |= {name: int(side.sum()), f"{name} against": int(against.sum())}
        self._tally.add(counts, *_squares(record.attribution))

    def _rows_told(self, record: RowStepRecord) -> int:
        told = record.attribution is not None and record.step >= FIRST_TOLD and len(record.rows)
        return int(record.side(1).sum()) if told else 0

    def _open_stream(self, out: Path) -> RowStream:
        return RowStream(out / "rows.jsonl")

    def _to_lines(self, record: RowStepRecord) -> list[dict[str, Any]]:
        return to_row_lines(record)

    def _to_window(self, records: Sequence[RowStepRecord], tokenizer: Any) -> GroupWindow:
        return to_group_window(records, tokenizer)


def _squares(account: StepAttribution | None) -> tuple[float, float]:
    """Sums of squares of what an account leaves unexplained, and of the realised changes; 0 where unknown."""
    if account is None or account.realised is None or account.rest is None:
        return 0.0, 0.0
    return float(account.rest.square().sum()), float(account.realised.square().sum())


def same_kind(recordings: Sequence[Any], say: Callable[[str], object]) -> list[Any]:
    """The recordings of the first one's kind; where ranks disagree on whether rows are pairs, that is said."""
    kept = [part for part in recordings if type(part) is type(recordings[0])]
    if len(kept) < len(recordings):
        say(
            "gradent: some ranks see pairs in their rows and others do not; the others' rows are left out. pairing= "
            "says how rows belong together."
        )
    return kept
