"""What becomes of measured steps: records, scalars, words, panels and lines of a file; of pairs, and of groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradent.record.stream import PairStream, RowStream
from gradent.recorder.recording import Recording, RowRecording, join_recordings, join_row_recordings
from gradent.report.live.alerts import Alert, Alerter
from gradent.report.live.group_alerts import GroupAlerter
from gradent.report.live.group_panels import GroupPanels
from gradent.report.live.group_window import GroupWindow
from gradent.report.live.wandb import Panels
from gradent.report.live.window import Window
from gradent.trainer.records.row_step import RowStepRecord, summarize_rows, to_row_lines
from gradent.trainer.records.row_window import to_group_window
from gradent.trainer.records.step import StepRecord, layer_cosines, summarize, to_rows
from gradent.trainer.records.token_map import TokenMap
from gradent.trainer.records.window import to_window

__all__ = ["GroupJournal", "Journal", "PairJournal", "same_kind"]


class Journal(ABC):
    """What becomes of the measured steps of a run; a kind of rows says how records, scalars and windows are made."""

    def __init__(self, alerter: Alerter | GroupAlerter | None, panels: Panels | GroupPanels | None) -> None:
        # Each kind's alerter and panels take the windows that it makes.
        self._alerter: Any = alerter
        self._panels: Any = panels
        self._stream: PairStream | None = None

    def open(self, out: Path) -> None:
        """Write lines into a file of this directory from now on."""
        self._stream = self._open_stream(out)

    def append(self, record: Any) -> None:
        """Write a step's lines."""
        if self._stream is not None:
            self._stream.append(self._to_lines(record))

    def tell(self, records: Sequence[Any], scalars: Mapping[str, float], step: int, tokenizer: Any) -> str | None:
        """Send a window's panels; the line for the log, None for none."""
        window = self._to_window(records, tokenizer)
        text: str | None = None if self._alerter is None else self._alerter.check(window)
        if self._panels is not None:
            self._panels.send(window, scalars, step)
        return text

    def rewind(self) -> None:
        """Take every line off the file that was written since it was opened."""
        if self._stream is not None:
            self._stream.rewind()

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
        super().__init__(None if alert is None else Alerter(alert), Panels() if panels else None)
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
        return summarize(records) | {f"gradent/layer/{name}/cosine": value for name, value in layers.items()}

    def _open_stream(self, out: Path) -> PairStream:
        return PairStream(out / "pairs.jsonl")

    def _to_lines(self, record: StepRecord) -> list[dict[str, Any]]:
        return to_rows(record)

    def _to_window(self, records: Sequence[StepRecord], tokenizer: Any) -> Window:
        return to_window(records, tokenizer)


class GroupJournal(Journal):
    """Of rows that are no pairs: `rows.jsonl`, what moved positives and negatives, spikes."""

    def __init__(self, alert: Alert | None, *, panels: bool) -> None:
        super().__init__(None if alert is None else GroupAlerter(alert), GroupPanels() if panels else None)

    def record(
        self, step: int, recordings: Sequence[RowRecording], realised: Sequence[Tensor] | None, tokens: TokenMap | None
    ) -> RowStepRecord:
        """See `Journal`."""
        moved = None if realised is None else torch.cat(list(realised))
        return RowStepRecord.of(step, join_row_recordings(recordings), realised=moved)

    def summarize(self, records: Sequence[RowStepRecord]) -> dict[str, float]:
        """See `Journal`."""
        return summarize_rows(records)

    def _open_stream(self, out: Path) -> RowStream:
        return RowStream(out / "rows.jsonl")

    def _to_lines(self, record: RowStepRecord) -> list[dict[str, Any]]:
        return to_row_lines(record)

    def _to_window(self, records: Sequence[RowStepRecord], tokenizer: Any) -> GroupWindow:
        return to_group_window(records, tokenizer)


def same_kind(recordings: Sequence[Any], say: Callable[[str], object]) -> list[Any]:
    """The recordings of the first one's kind; where ranks disagree on whether rows are pairs, that is said."""
    kept = [part for part in recordings if type(part) is type(recordings[0])]
    if len(kept) < len(recordings):
        say(
            "gradent: some ranks see pairs in their rows and others do not; the others' rows are left out. pairing= "
            "says how rows belong together."
        )
    return kept
