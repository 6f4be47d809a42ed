"""What a run started from: the base that its adapters or its model card name, or the one the user gives."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # huggingface_hub's
from huggingface_hub.repocard import metadata_load

from gradent.errors import GradentError, InputError
from gradent.loading.files import brief, is_hub_id, leads_outside
from gradent.loading.weight_files import CONFIGS, check_weights, kind_of
from gradent.text import quoted

__all__ = ["base_of_adapters", "base_of_card", "base_problem", "check_given"]

_MOST_CARD = 256 * 2**10  # bytes; a model card is a page


def check_given(base: str) -> None:
    """Refuse a base that the user gave and that cannot be one."""
    if not os.path.isdir(base) and not is_hub_id(base):
        raise InputError(
            f"base {quoted(base, 400)}: there is no such directory, and it is no hub id (owner/name) either. Give the "
            "directory or hub id of the full model that training started from (command line: --base)."
        )
    problem = _directory_problem(base)
    if problem is not None:
        raise InputError(
            f"The base cannot be used: {problem} Give the directory or hub id of the full model that training started "
            "from (command line: --base)."
        )


def base_of_adapters(named: Sequence[str | None]) -> str | None:
    """The base that most of a run's adapters name, of several the later; None where none is named."""
    counts = Counter(base for base in reversed(named) if base)
    return counts.most_common(1)[0][0] if counts else None


def base_problem(base: str | None, run: str) -> str | None:
    """Why a base cannot be used, told without loading it or asking the hub, and the remedy; else None."""
    remedy = f"Run: gradent audit {run} --base DIR, with the model that training started from."
    if base is None:
        return f"its adapter_config.json names no base model. {remedy}"
    if not os.path.isabs(base) and ".." in Path(base).parts:
        return f"the base that it names, {quoted(base)}, is a path out of here, and is not followed. {remedy}"
    if not os.path.isdir(base) and not is_hub_id(base):
        return f"the base that it names, {quoted(base, 400)}, does not exist here. {remedy}"
    problem = _directory_problem(base)
    return None if problem is None else f"its base cannot be used: {problem} {remedy}"


def base_of_card(directory: Path, root: Path) -> tuple[str | None, str]:
    """The base that a run's model card names: `base_model:` in the front matter of README.md, which TRL writes."""
    card = directory / "README.md"
    if not os.path.isfile(card):
        return None, "the run has no model card (README.md)"
    if leads_outside(card, root):
        return None, "its README.md is a link that leads out of the run's directory, and is not followed"
    if card.stat().st_size > _MOST_CARD:
        return None, f"its README.md is larger than {_MOST_CARD >> 10} KiB, and is not read"
    try:
        named = (metadata_load(card) or {}).get("base_model")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return None, f"the front matter of its README.md cannot be read ({brief(error)})"
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    if named is None:
        return None, "its model card names no base_model (TRL writes one only where the base came from the hub)"
    if not isinstance(named, str):
        return None, "the base_model of its model card is not a single name"
    if base_problem(named, "RUN") is not None:
        return None, f"the base_model of its model card, {quoted(named)}, is no model that can be used here"
    return named, ""


def _directory_problem(base: str) -> str | None:
    """Why a directory is no whole full model; nothing is said of what is no directory."""
    if not os.path.isdir(base):
        return None
    try:
        kind = kind_of(Path(base))
        if kind == "adapter":
            return f"{base}: is a PEFT adapter (by its {CONFIGS[kind]}), and a base is a full model."
        check_weights(Path(base), kind)
    except GradentError as error:
        return str(error)
    return None
