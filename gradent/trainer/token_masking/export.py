"""Scores and masks of every response token, from a trainer to a table's columns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset
from torch import Tensor

from gradent.errors import InputError
from gradent.record.masks import MASK_COLUMNS, write_masks
from gradent.text import token_texts
from gradent.trainer.token_masking.policy import TokenMasks

__all__ = ["mask_batches", "write_mask_table"]

_NUMBER = "gradent_pair"  # a column of our own, while the data is tokenized

Batches = Iterator[tuple[dict[str, Any], list[int]]]
"""TRL's batches, each with its pairs' numbers."""


def mask_batches(data: Any, trainer: Any) -> Batches:
    """A dataset, a list of preference rows or one batch, as TRL's batches; a pair's number is its row in the data."""
    # On several ranks all must call this, since TRL tokenizes on one after the other.
    if isinstance(data, Mapping) and isinstance(data.get("input_ids"), Tensor) and "completion_mask" in data:
        return iter([(dict(data), list(range(len(data["input_ids"]) // 2)))])
    rows = Dataset.from_list(data) if isinstance(data, list) and data else data
    if not isinstance(rows, Dataset):
        raise InputError(
            f"export_masks: received {type(data).__name__}; accepted are a Dataset of preference data, a list of its "
            "rows (at least one), or one batch of the trainer's data loader (input_ids, attention_mask, "
            "completion_mask)."
        )
    if not len(rows):
        raise InputError("export_masks: the data holds no rows.")
    rows = rows.add_column(_NUMBER, list(range(len(rows))))  # TRL leaves out pairs whose prompt is too long
    if "chosen_ids" not in rows.column_names:
        rows = trainer._prepare_dataset(  # noqa: SLF001  (as TRL's own `evaluate` does)
            rows, trainer.processing_class, trainer.args, "masks"
        )
    return _collated(rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids", _NUMBER]), trainer)


def _collated(rows: Dataset, trainer: Any) -> Batches:
    size = trainer.args.per_device_eval_batch_size
    for start in range(0, len(rows), size):
        part = list(rows.select(range(start, min(start + size, len(rows)))))
        yield trainer.data_collator(part), [row[_NUMBER] for row in part]


def write_mask_table(
    path: str | os.PathLike[str], batches: Batches, *, read: Callable[[Mapping[str, Any]], TokenMasks], tokenizer: Any
) -> None:
    """Read the masks of batch after batch, and write them to a parquet file."""
    columns: dict[str, list[Any]] = {name: [] for name in MASK_COLUMNS}
    for batch, numbers in batches:
        masks = read(batch)
        rows = [(pair, side, place) for place, pair in enumerate(numbers) for side in ("chosen", "rejected")]
        for pair, side, place in rows:
            row = place + (len(numbers) if side == "rejected" else 0)
            marks = masks.tokens[row].cpu()
            # A token at the very start of a row is predicted by nothing and is left out.
            ids = batch["input_ids"][row, 1:].cpu()[marks].tolist()
            columns["pair"] += [pair] * len(ids)
            columns["side"] += [side] * len(ids)
            columns["position"] += (batch["completion_mask"][row].cpu().cumsum(0)[1:] - 1)[marks].tolist()
            columns["token_id"] += ids
            columns["kept"] += masks.kept[row].cpu()[marks].tolist()
            for name, values in (("score", masks.scores), ("mask", masks.soft)):
                columns[name] += values[row].detach().cpu()[marks].double().tolist()
    columns["token"] = token_texts(tokenizer, columns["token_id"])
    write_masks(path, columns)
