"""`masks.parquet`: a row a response token, with its score and its mask, as `TokenMaskedDPOTrainer` exports it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradent.errors import InputError
from gradent.record.parquet import TableKind

__all__ = ["MASKS", "MASK_COLUMNS", "mask_schema", "read_masks", "read_pair_masks", "write_masks"]

MASK_COLUMNS: dict[str, str] = {
    "pair": "int64", "side": "string", "position": "int64", "token_id": "int64", "token": "string", "score": "float64",
    "mask": "float64", "kept": "bool_",
}  # fmt: skip
"""Columns of `masks.parquet` in order, each with its Arrow type: a row a token of a response, prompts left out.

`pair` is the row of the data, counted from 0; `side` is chosen or rejected; `position` counts from 0 at the response's
first token; `token` is its text. `score` is `u`, `mask` its soft mask `σ(k(u - r))` at the k of the time of export, and
`kept` says whether `u >= r`. Where masks are frozen, `mask` is 1 and `kept` true whatever the score.
"""

MASKS = TableKind(name="masks", columns=MASK_COLUMNS, writer="TokenMaskedDPOTrainer.export_masks")

mask_schema, write_masks, read_masks = MASKS.schema, MASKS.write, MASKS.read


def read_pair_masks(
    path: str | os.PathLike[str], pair: int, ids: tuple[Sequence[int], Sequence[int]]
) -> dict[str, Any]:
    """Of each response `mask` (soft, 0 to 1) and `kept`, checked to be of these tokens; `source` is the file's name."""
    table = read_masks(path)
    rows = table.filter([number == pair for number in table["pair"].to_pylist()]).to_pylist()
    if not rows:
        raise InputError(
            f"{path}: holds no masks of row {pair} of the data. Export them for it, or choose another --pair."
        )
    masks: dict[str, Any] = {"source": Path(path).name}
    for side, tokens in zip(("chosen", "rejected"), ids, strict=True):
        part = sorted((row for row in rows if row["side"] == side), key=lambda row: row["position"])
        ids_there = [row["token_id"] for row in part]
        if ids_there != list(tokens):
            at = next((n for n, (a, b) in enumerate(zip(ids_there, tokens, strict=False)) if a != b), None)
            counts = f"{len(ids_there)} against {len(tokens)} tokens"
            where = counts if at is None else f"they differ from token {at} on"
            raise InputError(
                f"{path}: the masks of row {pair}, {side}, are of other tokens than are measured ({where}). "
                "Export them with the same data, tokenizer and lengths; plain strings get an EOS in both, unless "
                "--no-add-eos."
            )
        masks[side] = {"mask": [row["mask"] for row in part], "kept": [row["kept"] for row in part]}
    return masks
