"""The masks of one pair's tokens, from the file that `TokenMaskedDPOTrainer.export_masks` wrote."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradent.errors import InputError
from gradent.record.masks import read_masks

__all__ = ["read_pair_masks"]


def read_pair_masks(
    path: str | os.PathLike[str], pair: int, ids: tuple[Sequence[int], Sequence[int]]
) -> dict[str, Any]:
    """The masks of a pair, checked to be of the very same tokens.

    Args:
        path: `masks.parquet`.
        pair: row of the data, counted from 0.
        ids: tokens of the chosen and of the rejected response.

    Returns:
        `source` (the file's name), and for `chosen` and `rejected` lists of `mask` (soft, 0 to 1) and `kept`.

    Raises:
        InputError: the file has no masks of the pair, or they are of other tokens.
        DataFileError: there is no such file, or it is not one of masks.
    """
    table = read_masks(path)
    rows = table.filter([number == pair for number in table["pair"].to_pylist()]).to_pylist()
    if not rows:
        raise InputError(
            f"{path}: holds no masks of row {pair} of the data. Export them for it, or choose another --pair."
        )
    found: dict[str, Any] = {"source": Path(path).name}
    for side, tokens in zip(("chosen", "rejected"), ids, strict=True):
        part = sorted((row for row in rows if row["side"] == side), key=lambda row: row["position"])
        theirs = [row["token_id"] for row in part]
        if theirs != list(tokens):
            at = next((n for n, (a, b) in enumerate(zip(theirs, tokens, strict=False)) if a != b), None)
            where = (
                f"they differ from token {at} on" if at is not None else f"{len(theirs)} against {len(tokens)} tokens"
            )
            raise InputError(
                f"{path}: the masks of row {pair}, {side}, are of other tokens than are measured ({where}). "
                "Export them with the same data, tokenizer and lengths; plain strings get an EOS in both, unless "
                "--no-add-eos."
            )
        found[side] = {"mask": [row["mask"] for row in part], "kept": [row["kept"] for row in part]}
    return found
