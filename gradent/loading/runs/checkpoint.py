"""One saved model of a run, looked at: what it is, of which step, and why it could not be measured."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gradent.errors import DataFileError, GradentError, ModelError
from gradent.loading.weight_files import CONFIGS, check_links, check_weights, kind_of, leads_outside, read_object
from gradent.text import quoted

__all__ = ["STATE", "Checkpoint", "Saved", "State", "look_at", "read_state"]

STATE = "trainer_state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model that a run saved."""

    step: int  # the trainer's step; 0 is the model before training
    path: str  # its directory (of the base: a directory or hub id)
    name: str  # relative to the run, `checkpoint-200`; `base`; the run's own name for what stands in the run itself
    kind: str | None  # "full", "adapter", or None where it cannot be told
    problem: str | None = None  # why it cannot be measured, and what to do; None if nothing speaks against it


@dataclass(frozen=True, kw_only=True)
class State:
    """What a trainer_state.json says."""

    path: Path  # the file
    step: int  # of the optimizer, when it was written
    lines: int  # entries of its log
    best: bool  # whether the trainer watched for the best checkpoint, and so may have gone back to it in the end


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint with what its files say beyond it."""

    checkpoint: Checkpoint  # the checkpoint
    base: str | None  # what an adapter's config names as its base; None where it names none, and for full models
    state: State | None  # the trainer's, None where it is missing or not readable


def look_at(directory: Path, name: str, step: int, root: Path) -> Saved:
    """Look at a checkpoint's files, without loading its model."""
    kind = base = state = problem = None
    try:
        check_links(directory, root)
        kind = kind_of(directory)
        state = read_state(directory / STATE, root)
        _check_step(directory, step, state)
        check_weights(directory, kind)
        base = _base_named(read_object(directory / CONFIGS[kind or "full"]).get("base_model_name_or_path"))
    except GradentError as error:
        problem = str(error)
    checkpoint = Checkpoint(step=step, path=str(directory), name=name, kind=kind, problem=problem)
    return Saved(checkpoint=checkpoint, base=base if kind == "adapter" else None, state=state)


def read_state(path: Path, root: Path) -> State | None:
    """The trainer's state."""
    if not os.path.lexists(path):
        return None
    if leads_outside(path, root):
        raise ModelError(f"{path}: is a link that leads out of the run's directory, and is not followed. Remove it.")
    content = read_object(path)
    step, log = content.get("global_step"), content.get("log_history")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**18:
        raise DataFileError(
            f"{path}: global_step is {quoted(repr(step))}; a whole number is expected. Correct it, or remove the file."
        )
    lines = len(log) if isinstance(log, list) else 0
    return State(path=path, step=step, lines=lines, best=content.get("best_model_checkpoint") is not None)


def _check_step(directory: Path, step: int, state: State | None) -> None:
    if state is not None and state.step != step:
        raise ModelError(
            f"{directory}: its {STATE} says step {state.step}, and its name says step {step}. Was it renamed, or mixed "
            f"with another? Give it the name of its step, checkpoint-{state.step}, or remove the {STATE}."
        )


def _base_named(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
