"""The checkpoints of a finished run: which there are, of which step, and which of them cannot be measured and why.

A run is what a trainer of transformers or TRL leaves behind: a directory of `checkpoint-*` directories that hold full
models or PEFT adapters, each with the trainer's state. They are told by their files alone; no model is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gradent.errors import GradentError, InputError, ModelError
from gradent.loading.files import some
from gradent.loading.runs.base_model import base_of_adapters, base_of_card, base_problem, check_given
from gradent.loading.runs.checkpoint import Checkpoint, Saved, look_at, read_own_state
from gradent.loading.source import STATE, State
from gradent.loading.weight_files import kind_of
from gradent.text import quoted

__all__ = ["Checkpoint", "Run", "choose", "find_run", "is_run", "refuse_adapter"]

_NAME = re.compile(r"checkpoint-([0-9]{1,18})")
_A = {"full": "a full model", "adapter": "an adapter"}
_MANY = {"full": "full models", "adapter": "adapters"}
_BEGUN = re.compile(r"tmp-checkpoint-.*|checkpoint-.*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a trainer left in a directory."""

    directory: Path  # the run
    kind: str | None  # "full" or "adapter", what its checkpoints are; None where it cannot be told of any
    # directory or hub id of the model that training started from (of adapters, the one they stand on), or None
    base: str | None
    checkpoints: list[Checkpoint]  # all that were saved, by step, also those with a problem
    start: Checkpoint | None  # the base of a full run, as step 0; None for adapters, and where the base is not known
    history: Path | None  # the trainer's state with the most that was logged, or None
    notes: list[str]  # what was left aside, and other things that a reader should know


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a directory that holds at least one `checkpoint-<step>` directory."""
    try:
        names = os.listdir(path)
    except (OSError, ValueError):
        return False  # a file, a hub id, a name that no file can have
    return any(_NAME.fullmatch(name) and os.path.isdir(Path(path) / name) for name in names)


def refuse_adapter(run: str, adapter: str | None) -> None:
    """Refuse an adapter beside a run, which has its own."""
    if adapter is not None:
        raise InputError(
            f"{run}: is a run (it has checkpoint-* in it), and --adapter {adapter} is given. Leave --adapter out; for "
            "one adapter alone, give the base model as MODEL."
        )


def find_run(path: str | os.PathLike[str], *, base: str | None = None) -> Run:
    """Find a run's checkpoints, and what is wrong with each."""
    directory = Path(path)
    if not is_run(directory):
        raise InputError(
            f"{directory}: not a run. A run is a directory that holds checkpoint-<step> directories, as a trainer "
            "leaves it. For a single model or adapter, give its own directory or hub id."
        )
    if base is not None:
        check_given(base)
    root, notes = Path(os.path.realpath(directory)), list[str]()
    saved = [look_at(directory / name, name, step, root) for step, name in _numbered(directory, notes)]
    kind = _common_kind([model.checkpoint for model in saved])
    state, last = _look_at_root(directory, root, kind, saved, notes)
    # The state with the most lines; of several the run's own, else the last checkpoint's.
    states = [known for known in [state, *(model.state for model in reversed(saved))] if known is not None]
    history = max(states, key=lambda known: known.lines).path if states else None
    if history is None:
        notes.append(f"{directory}: no checkpoint has a readable {STATE}, so what the trainer logged is not known.")
    saved += last
    start = None
    if kind == "full":
        base = base or _base_of_full(directory, root, notes)
        if base is not None and all(model.checkpoint.step for model in saved):
            start = Checkpoint(step=0, path=base, name="base", kind="full")
    if kind == "adapter" and base is None:
        base = base_of_adapters([model.base for model in saved])
        problem = base_problem(base, str(directory))
        saved = [_on_base(model, base, problem, str(directory)) for model in saved]
    checkpoints = _of_one_kind([model.checkpoint for model in saved], kind)
    return Run(
        directory=directory, kind=kind, base=base, checkpoints=checkpoints, start=start, history=history, notes=notes
    )


def choose(run: Run, spec: str | Sequence[int]) -> list[Checkpoint]:
    """The checkpoints of "all", "last" or steps, by step; those with a problem are among them, to be left out."""
    known = [*([] if run.start is None else [run.start]), *run.checkpoints]
    if isinstance(spec, str) and spec.strip() == "all":
        chosen = known
    elif isinstance(spec, str) and spec.strip() == "last":
        sound = [number for number, model in enumerate(known) if model.problem is None and model is not run.start]
        chosen = known[sound[-1] :] if sound else run.checkpoints
    else:
        steps = _read_steps(spec)
        _check_there(run, steps, [checkpoint.step for checkpoint in known])
        chosen = [checkpoint for checkpoint in known if checkpoint.step in steps]
    if all(checkpoint.problem is not None for checkpoint in chosen):
        reasons = "\n".join(str(checkpoint.problem) for checkpoint in chosen)
        raise ModelError(f"{run.directory}: none of the checkpoints that are asked for can be measured.\n{reasons}")
    return chosen


def _numbered(directory: Path, notes: list[str]) -> list[tuple[int, str]]:
    """Steps and names of the checkpoints, in order; what only looks like one is noted."""
    numbered = []
    for name in sorted(os.listdir(directory)):
        match = _NAME.fullmatch(name)
        if match and os.path.isdir(directory / name):
            numbered.append((int(match[1]), name))
        elif match or _BEGUN.fullmatch(name):
            why = "not a directory" if match else "an unfinished save, or not named checkpoint-<step>"
            notes.append(f"{directory}: {quoted(name)} is left aside: {why}.")
    return sorted(numbered)


def _look_at_root(
    directory: Path, root: Path, kind: str | None, saved: list[Saved], notes: list[str]
) -> tuple[State | None, list[Saved]]:
    """The state in the run's own directory, and the model there if it is a later one than every checkpoint's."""
    last = saved[-1].checkpoint
    try:
        state = read_own_state(directory / STATE, root)
    except GradentError as error:
        notes.append(f"The trainer's state in the run's own directory is not read. {error}")
        state = None
    root_kind = kind_of(directory)
    if root_kind is None:
        return state, []
    if state is None:
        why = f"no readable {STATE} stands beside it, so its step is not known"
    elif state.step <= last.step:
        why = f"its {STATE} says step {state.step}, and {last.name} is of step {last.step}"
    elif state.best:
        why = "the run kept the best of its checkpoints, so it may be that one and not the last step's"
    elif kind is not None and root_kind != kind:
        why = f"it is {_A[root_kind]}, and the run's checkpoints are {_MANY[kind]}"
    else:
        return state, [look_at(directory, os.path.basename(os.path.abspath(directory)), state.step, root)]
    notes.append(f"{directory}: the model in the run's own directory is left aside: {why}.")
    return state, []


def _base_of_full(directory: Path, root: Path, notes: list[str]) -> str | None:
    base, why = base_of_card(directory, root)
    if base is None:
        notes.append(
            f"{directory}: the model before training (step 0) is left out: {why}. To measure it too, pass --base DIR, "
            "with the model that training started from."
        )
    return base


def _on_base(saved: Saved, base: str | None, problem: str | None, run: str) -> Saved:
    """The same adapter, with a problem where it has another base than the run, or one that cannot be used."""
    checkpoint = saved.checkpoint
    if checkpoint.problem is not None or checkpoint.kind != "adapter":
        return saved
    if saved.base is None:
        problem = base_problem(None, run)
    elif saved.base != base:
        problem = (
            f"an adapter for another base, {quoted(saved.base, 400)}; those of this run are for "
            f"{quoted(str(base), 400)}. If it is the same model elsewhere, run: gradent audit {run} --base DIR"
        )
    if problem is None:
        return saved
    return replace(saved, checkpoint=replace(checkpoint, problem=f"{checkpoint.path}: {problem}"))


def _common_kind(checkpoints: list[Checkpoint]) -> str | None:
    """What the last of them is, of the sound ones if there are any."""
    sound = [checkpoint for checkpoint in checkpoints if checkpoint.problem is None]
    kinds = [checkpoint.kind for checkpoint in sound or checkpoints]
    return next((kind for kind in reversed(kinds) if kind is not None), None)


def _of_one_kind(checkpoints: list[Checkpoint], kind: str | None) -> list[Checkpoint]:
    """The same, with a problem for what is of another kind than the run, and for a step that is there twice."""
    done: list[Checkpoint] = []
    for checkpoint in checkpoints:
        problem = checkpoint.problem
        if problem is None and kind is not None and checkpoint.kind is not None and checkpoint.kind != kind:
            problem = (
                f"{checkpoint.path}: is {_A[checkpoint.kind]}, and the run's last checkpoint is {_A[kind]}, so they "
                "are not of one run. Audit it by itself: give its directory as the model."
            )
        if problem is None and any(other.step == checkpoint.step and other.problem is None for other in done):
            problem = f"{checkpoint.path}: another checkpoint has step {checkpoint.step} as well. Remove one of them."
        done.append(replace(checkpoint, problem=problem))
    return done


def _read_steps(spec: str | Sequence[int]) -> set[int]:
    accepted = "accepted: all, last, or steps such as 0,200,400 (command line: --checkpoints; in Python also [0, 200])."
    parts = [part.strip() for part in spec.split(",")] if isinstance(spec, str) else list(spec)
    is_whole = all(
        re.fullmatch("[0-9]{1,18}", part) if isinstance(part, str) else type(part) is int and part >= 0
        for part in parts
    )
    if not parts or not is_whole:
        raise InputError(f"checkpoints is {quoted(str(spec))}; {accepted}")
    return {int(part) for part in parts}


def _check_there(run: Run, steps: set[int], known: list[int]) -> None:
    unknown = sorted(steps - set(known))
    if not unknown:
        return
    listed = f"It has {some([str(step) for step in known], 50)}."
    why = f"has no checkpoint of step {some([str(step) for step in unknown])}."
    if unknown == [0] and run.kind == "adapter":
        why = "step 0 cannot be measured: the first, random adapter that training started from was not saved."
    elif unknown == [0] and run.kind == "full":
        model = "the model that training started from"
        why = f"step 0, the model before training, is not known. Pass --base DIR, with {model}."
    raise InputError(f"{run.directory}: {why} {listed}")
