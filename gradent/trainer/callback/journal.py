"""What becomes of measured steps: records, scalars, words, panels and lines of a file; of pairs, and of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gradent.record.stream import PairStream, RowStream
from gradent.recorder.recording import Recording, RowRecording, join_recordings, join_row_recordings
from gradent.report.live.alerts import Alert, Alerter
from gradent.report.live.group_alerts import GroupAlerter
from gradent.report.live.group_panels import GroupPanels
from gradent.report.live.wandb import Panels
from gradent.trainer.records.row_step import RowStepRecord, summarize_rows, to_row_lines
from gradent.trainer.records.row_window import to_group_window
from gradent.trainer.records.step import StepRecord, layer_cosines, summarize, to_rows
from gradent.trainer.records.token_map import TokenMap
from gradent.trainer.records.window import to_window

__all__ = ["GroupJournal", "Journal", "PairJournal", "same_kind"]


class Journal(Protocol):
    """What becomes of the measured steps of a run."""

    def open(self, out: Path) -> None:
        """Write lines into a file of this directory from now on."""

    def record(
        self, step: int, recordings: Sequence[Any], realised: Sequence[Tensor] | None, tokens: TokenMap | None
    ) -> Any:
        """The record of a step, from what all ranks harvested, and how much their rows moved."""

    def append(self, record: Any) -> None:
        """Write a step's lines."""

    def summarize(self, records: Sequence[Any]) -> dict[str, float]:
        """The scalars of a window of at least one step."""

    def tell(self, records: Sequence[Any], scalars: Mapping[str, float], step: int, tokenizer: Any) -> str | None:
        """Send a window's panels; the line for the log, None for none."""

    def close(self) -> None:
        """Close the file."""


class PairJournal:
    """Of pairs: `pairs.jsonl`, cases, layers."""

    def __init__(self, alert: Alert | None, *, panels: bool, by_module: bool) -> None:
        self._stream: PairStream | None = None
        self._alerter, self._panels = None if alert is None else Alerter(alert), Panels() if panels else None
        self._by_module = by_module

    def open(self, out: Path) -> None:
        """See `Journal`."""
        self._stream = PairStream(out / "pairs.jsonl")

    def record(
        self, step: int, recordings: Sequence[Recording], realised: Sequence[Tensor] | None, tokens: TokenMap | None
    ) -> StepRecord:
        """See `Journal`."""
        moved = None if realised is None else torch.cat([part.view(2, -1) for part in realised], 1)
        return StepRecord.of(step, join_recordings(recordings), realised=moved, tokens=tokens)

    def append(self, record: StepRecord) -> None:
        """See `Journal`."""
        if self._stream is not None:
            self._stream.append(to_rows(record))

    def summarize(self, records: Sequence[StepRecord]) -> dict[str, float]:
        """See `Journal`."""
        layers = layer_cosines(records) if self._by_module else {}
        return summarize(records) | {f"gradent/layer/{name}/cosine": value for name, value in layers.items()}

    def tell(
        self, records: Sequence[StepRecord], scalars: Mapping[str, float], step: int, tokenizer: Any
    ) -> str | None:
        """See `Journal`."""
        window = to_window(records, tokenizer)
        text = None if self._alerter is None else self._alerter.check(window)
        if self._panels is not None:
            self._panels.send(window, scalars, step)
        return text

    def close(self) -> None:
        """See `Journal`."""
        if self._stream is not None:
            self._stream.close()


class GroupJournal:
    """Of rows that are no pairs: `rows.jsonl`, what moved positives and negatives, spikes."""

    def __init__(self, alert: Alert | None, *, panels: bool) -> None:
        self._stream: RowStream | None = None
        self._alerter, self._panels = None if alert is None else GroupAlerter(alert), GroupPanels() if panels else None

    def open(self, out: Path) -> None:
        """See `Journal`."""
        self._stream = RowStream(out / "rows.jsonl")

    def record(
        self, step: int, recordings: Sequence[RowRecording], realised: Sequence[Tensor] | None, tokens: TokenMap | None
    ) -> RowStepRecord:
        """See `Journal`."""
        moved = None if realised is None else torch.cat(list(realised))
        return RowStepRecord.of(step, join_row_recordings(recordings), realised=moved)

    def append(self, record: RowStepRecord) -> None:
        """See `Journal`."""
        if self._stream is not None:
            self._stream.append(to_row_lines(record))

    def summarize(self, records: Sequence[RowStepRecord]) -> dict[str, float]:
        """See `Journal`."""
        return summarize_rows(records)

    def tell(
        self, records: Sequence[RowStepRecord], scalars: Mapping[str, float], step: int, tokenizer: Any
    ) -> str | None:
        """See `Journal`."""
        window = to_group_window(records, tokenizer)
        text = None if self._alerter is None else self._alerter.check(window)
        if self._panels is not None:
            self._panels.send(window, scalars, step)
        return text

    def close(self) -> None:
        """See `Journal`."""
        if self._stream is not None:
            self._stream.close()


def same_kind(recordings: Sequence[Any], say: Callable[[str], object]) -> list[Any]:
    """The recordings of the first one's kind; where ranks disagree on whether rows are pairs, that is said."""
    kept = [part for part in recordings if type(part) is type(recordings[0])]
    if len(kept) < len(recordings):
        say(
            "gradent: some ranks see pairs in their rows and others do not; the others' rows are left out. pairing= "
            "says how rows belong together."
        )
    return kept
