"""`masks.parquet`: a row a response token, with its score and its mask, as `TokenMaskedDPOTrainer` exports it."""

from __future__ import annotations

from gradent.record.parquet import TableKind

__all__ = ["MASKS", "MASK_COLUMNS", "mask_schema", "read_masks", "write_masks"]

MASK_COLUMNS: dict[str, str] = {
    "pair": "int64",
    "side": "string",
    "position": "int64",
    "token_id": "int64",
    "token": "string",
    "score": "float64",
    "mask": "float64",
    "kept": "bool_",
}
"""Columns of `masks.parquet` in order, each with its Arrow type: a row a token of a response, prompts left out.

`pair` is the row of the data, counted from 0; `side` is chosen or rejected; `position` counts from 0 at the response's
first token; `token` is its text. `score` is `u`, `mask` its soft mask `σ(k(u - r))` at the k of the time of export, and
`kept` says whether `u >= r`. Where masks are frozen, `mask` is 1 and `kept` true whatever the score.
"""

MASKS = TableKind(name="masks", columns=MASK_COLUMNS, writer="TokenMaskedDPOTrainer.export_masks")

mask_schema, write_masks, read_masks = MASKS.schema, MASKS.write, MASKS.read
