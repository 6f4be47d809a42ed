"""Files and names that may come from anywhere: what is read is bounded, and what messages show of them is short."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from gradent.errors import DataFileError

__all__ = ["AGAIN", "brief", "hint", "is_hub_id", "leads_outside", "read_object", "some"]

AGAIN = "It was cut off while it was saved or copied, or damaged: copy it again from where the run was trained."
_MOST_JSON = 256 * 2**20


def is_hub_id(name: str) -> bool:
    """Whether a text can be a hub id: `name` or `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def leads_outside(path: Path, root: Path) -> bool:
    """Whether a path, its links followed, ends outside of a resolved directory."""
    return not Path(os.path.realpath(path)).is_relative_to(root)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of at most 256 MiB."""
    if not os.path.isfile(path):
        raise DataFileError(f"{path}: there is no such file. Copy it again from where the run was trained.")
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > _MOST_JSON:
                raise DataFileError(
                    f"{path}: {size} bytes, which is no sound size for this file: up to {_MOST_JSON} "
                    f"({_MOST_JSON >> 20} MiB) are read. Remove it, or put the right file in its place."
                )
            content = json.loads(handle.read(_MOST_JSON))
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise DataFileError(f"{path}: cannot be read as JSON ({brief(error)}). {AGAIN}") from error
    if not isinstance(content, dict):
        raise DataFileError(f"{path}: holds a {type(content).__name__}; a JSON object is expected. {AGAIN}")
    return content


def some(names: list[str], count: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def brief(error: BaseException) -> str:
    """The first lines of another library's message: they say what, and the rest repeats it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"


def hint(name: str) -> str:
    """What to look at where a name could not be loaded; nothing for a directory that is there."""
    if Path(name).is_dir():
        return ""
    return (
        " There is no such directory here; if it is a hub id, check it, your network and, for a gated model, "
        "`hf auth login`."
    )
