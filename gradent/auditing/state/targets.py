"""What an audit measures: one model, or checkpoints of a run; and which reference it holds against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from gradent.auditing.state.config import AuditConfig
from gradent.errors import InputError
from gradent.loading.adapters import changes_base, frozen_reference, under
from gradent.loading.preferences import AuditPair
from gradent.loading.prepare import Material
from gradent.loading.runs.checkpoint import Checkpoint
from gradent.loading.runs.discover import Run, choose, find_run, is_run, refuse_adapter
from gradent.loading.source import ModelSource, checkpoint_above, read_adapter_file, read_step, resolve_source
from gradent.loading.weight_files import named_adapters
from gradent.record.json_lines import digest

__all__ = ["AuditPlan", "ReferenceChoice", "ReferenceOptions", "Target", "choose_reference", "find_targets"]

Tell = Callable[[str], None]


class ReferenceOptions(Protocol):
    """Options that say which reference is meant."""

    @property
    def reference(self) -> str | None:
        """What the user passed for it."""

    @property
    def loss(self) -> Any:
        """A `Loss`."""

    @property
    def quantize(self) -> str | None:
        """How the base under an adapter is quantized."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One model to measure."""

    name: str  # what records call it
    step: int  # the trainer's step at which it was saved
    source: ModelSource | None  # where it is; None where it cannot be measured
    problem: str | None = None  # why not; None where it can

    @cached_property
    def identity(self) -> str:
        """A digest of its name, step and files, as they are when it is first asked for."""
        return digest([self.name, self.step, _model_files(self.source)])


@dataclass(frozen=True, kw_only=True)
class ReferenceChoice:
    """Where the reference's log-probs come from."""

    kind: str  # "none", "self" (each model is its own), "adapter_off" or "model"
    source: ModelSource | None = None  # of the model that is loaded for it, first and alone; None where none is
    passed: str | None = None  # what the user passed for it, if anything

    @cached_property
    def identity(self) -> str:
        """A digest of its files, as they are when it is first asked for."""
        return digest(_model_files(self.source))


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """What there is to measure, and what is known of it."""

    targets: list[Target]
    run: Run | None  # None for a single model
    reference: ReferenceChoice
    material: Material
    batches: list[list[int]]  # positions of pairs

    @property
    def pairs(self) -> list[AuditPair]:
        """All pairs to measure, by row."""
        return self.material.pairs.pairs


def find_targets(config: AuditConfig) -> tuple[list[Target], Run | None]:
    """The models to measure, by step, and the run that they are of; None for a single model."""
    model, checkpoints = config.model, config.checkpoints
    if not is_run(model):
        if config.base is not None:
            raise InputError(
                f"{model}: is not a run (it has no checkpoint-* in it), and base={config.base!r} is given. Leave "
                "--base out."
            )
        if checkpoints != "all":
            raise InputError(
                f"{model}: is not a run (it has no checkpoint-* in it), and checkpoints={checkpoints!r} is asked for. "
                "Leave --checkpoints out, or give the directory that holds checkpoint-*."
            )
        source = resolve_source(model, config.adapter, quantize=config.quantize)
        return [Target(name=source.name, step=read_step(source), source=source)], None
    refuse_adapter(model, config.adapter)
    run = find_run(model, base=config.base)
    if config.quantize is not None and run.kind == "full":
        raise InputError(
            f"{model}: is a run of full models, and quantize={config.quantize!r} is for the base under adapters, since "
            "quantized weights are not trained. Leave --quantize out."
        )
    return [_to_target(checkpoint, run, config.quantize) for checkpoint in choose(run, checkpoints)], run


def choose_reference(
    targets: Sequence[Target], run: Run | None, config: ReferenceOptions, tell: Tell
) -> ReferenceChoice:
    """The reference that the user passed, or else the one that the run had; a choice made for the user is told."""
    if config.reference is not None:
        return ReferenceChoice(
            kind="model", source=resolve_source(config.reference, weights=False), passed=config.reference
        )
    source = next(target.source for target in targets if target.source is not None)
    needed = config.loss.name if config.loss.needs_reference else None  # the loss that cannot do without
    frozen = None if source.adapter is None else frozen_reference(source.adapter)
    if frozen is not None:
        tell(f"The reference is {frozen}, the adapter that TRL kept frozen for it (--reference for another).")
        kept = ModelSource(base=source.base, adapter=frozen, name=frozen, quantize=config.quantize)
        return ReferenceChoice(kind="model", source=kept)
    above = checkpoint_above(source.adapter)
    others = [str(path) for path in ({} if above is None else named_adapters(above)).values()]
    for other in sorted({*others} - {source.adapter}):
        tell(f"Beside the adapter lies {other}: if it was the run's reference, pass it with --reference.")
    if run is None:
        return _reference_of_one(source, needed, tell)
    if run.base is None and needed is None:
        return ReferenceChoice(kind="none")
    if run.base is None:
        raise InputError(
            f"{run.directory}: {needed} needs the log-probs of a reference, and nothing in this run says which model "
            "it started from (no base_model in a README.md). Pass it with --base (or another one with --reference)."
        )
    if source.adapter is not None and _trains_biases(source.adapter):
        tell(
            f"The adapters train biases of the base; the reference is the base {run.base} as it was, whereas in TRL "
            "they stay as trained where an adapter is switched off."
        )
    else:
        tell(f"The reference is {run.base}, which the run started from (--reference for another).")
    if source.adapter is None:
        return ReferenceChoice(kind="model", source=ModelSource(base=run.base, adapter=None, name=run.base))
    _tell_of_start(source.adapter, tell)
    return ReferenceChoice(kind="adapter_off", source=under(run.base, source.adapter, config.quantize))


def _reference_of_one(source: ModelSource, needed: str | None, tell: Tell) -> ReferenceChoice:
    if source.adapter is None and needed is None:
        return ReferenceChoice(kind="none")
    if source.adapter is None:
        tell(
            "The model is its own reference, as at the first step of training: the loss sees log-ratios of 0. If it "
            "has been trained on preferences already, pass the model it started from with --reference."
        )
        return ReferenceChoice(kind="self")
    tell(f"The reference is the base {source.base} without the adapter, as in TRL (--reference for another).")
    if _trains_biases(source.adapter):
        tell(
            "The adapter trains biases of the base, and they stay as trained where it is switched off, in TRL as "
            f"well. For the base as it was, pass --reference {source.base}."
        )
    return ReferenceChoice(kind="adapter_off")


def _tell_of_start(adapter: str, tell: Tell) -> None:
    start = changes_base(adapter)
    if start is None:
        return
    drawn = " That start draws random numbers, so what is made again is near the run's and not the same." * (
        "niter" in start
    )
    tell(f"init_lora_weights={start!r} changes the base: the reference is the changed base, made again.{drawn}")


def _trains_biases(adapter: str) -> bool:
    return str(read_adapter_file(adapter).get("bias", "none")) != "none"


def _to_target(checkpoint: Checkpoint, run: Run, quantize: str | None) -> Target:
    problem, source = checkpoint.problem, None
    if problem is None and checkpoint.kind == "adapter":
        if run.base is None:
            problem = f"{checkpoint.path}: nothing says which base model this adapter belongs to. Pass --base."
        else:
            source = ModelSource(base=run.base, adapter=checkpoint.path, name=checkpoint.name, quantize=quantize)
    elif problem is None:
        source = ModelSource(base=checkpoint.path, adapter=None, name=checkpoint.name)
    return Target(name=checkpoint.name, step=checkpoint.step, source=source, problem=problem)


def _model_files(source: ModelSource | None) -> list[Any] | None:
    if source is None:
        return None
    how = [*(["adapter off"] if source.adapter_off else []), *([source.quantize] if source.quantize else [])]
    return [_files(source.base), _files(source.adapter), *how]


def _files(name: str | None) -> list[tuple[str, int, int]] | str | None:
    """Name, size and time of the files that make a model; a hub id stands for itself."""
    if name is None or not Path(name).is_dir():
        return name
    files = [path for kind in ("*.safetensors", "*.index.json", "*config.json") for path in Path(name).glob(kind)]
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
