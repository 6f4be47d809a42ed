"""One saved model of a run, looked at: what it is, of which step, and why it could not be measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradent.errors import GradentError, ModelError
from gradent.loading.files import leads_outside, read_object
from gradent.loading.source import STATE, State, read_state, trained_adapter
from gradent.loading.weight_files import CONFIGS, check_links, check_weights, kind_of

__all__ = ["Checkpoint", "Saved", "look_at", "read_own_state"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model that a run saved."""

    step: int  # the trainer's step; 0 is the model before training
    path: str  # its directory (of the base: a directory or hub id)
    name: str  # relative to the run, `checkpoint-200`; `base`; the run's own name for what stands in the run itself
    kind: str | None  # "full", "adapter", or None where it cannot be told
    problem: str | None = None  # why it cannot be measured, and what to do; None if nothing speaks against it


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint with what its files say beyond it."""

    checkpoint: Checkpoint  # the checkpoint
    base: str | None  # what an adapter's config names as its base; None where it names none, and for full models
    state: State | None  # the trainer's, None where it is missing or not readable


def look_at(directory: Path, name: str, step: int, root: Path) -> Saved:
    """Look at a checkpoint's files, without loading its model."""
    kind = base = state = problem = None
    model = directory
    try:
        check_links(directory, root)
        model = trained_adapter(directory) or directory
        if model is not directory:
            check_links(model, root)
        kind = kind_of(model)
        state = read_own_state(directory / STATE, root)
        if state is not None and state.step != step:
            raise ModelError(
                f"{directory}: its {STATE} says step {state.step}, and its name says step {step}. Was it renamed, or "
                f"mixed with another? Give it the name of its step, checkpoint-{state.step}, or remove the {STATE}."
            )
        check_weights(model, kind)
        base = read_object(model / CONFIGS[kind or "full"]).get("base_model_name_or_path")
    except GradentError as error:
        problem = str(error)
    checkpoint = Checkpoint(step=step, path=str(model), name=name, kind=kind, problem=problem)
    is_named = kind == "adapter" and isinstance(base, str) and base != ""
    return Saved(checkpoint=checkpoint, base=base if is_named else None, state=state)


def read_own_state(path: Path, root: Path) -> State | None:
    """The trainer's state, unless it is a link that leads out of the run; None where there is none."""
    if leads_outside(path, root):
        raise ModelError(f"{path}: is a link that leads out of the run's directory, and is not followed. Remove it.")
    return read_state(path)
