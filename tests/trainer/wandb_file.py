"""What an offline run of wandb holds: its `.wandb` file is a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEAD = 32768, 7


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that the one run below a folder has logged, nested keys joined by dots."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in _records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def summary(folder: Path) -> dict[str, Any]:
    """What the run has put into its summary by itself; the last value of each key."""
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in _records(folder)
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }


def _records(folder: Path) -> Iterator[Any]:
    (path,) = folder.rglob("*.wandb")
    for raw in _chunks(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        yield record


def _chunks(content: bytes) -> Iterator[bytes]:
    at, parts = HEAD, b""
    while at + HEAD <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEAD:  # the rest of a block is padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEAD])
        parts += content[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # whole, or last part
            yield parts
            parts = b""
