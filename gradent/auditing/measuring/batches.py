"""One model over batches of pairs of like length: the Gram entries and the reference's log-probs of each.

What a batch gives is plain numbers, so that it can be written down as it comes; `join_blocks` puts batches together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradent.errors import GradentError, NonFiniteError
from gradent.loading.preferences import AuditPair, batch_of
from gradent.measurement import measure, sequence_logps
from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch
from gradent.record.table import Floats, Table, stack

__all__ = [
    "ENTRIES", "REFERENCES", "BatchResults", "Block", "Reference", "adapter_off", "check_reference", "itself",
    "join_blocks",
    "measure_batches", "measure_reference", "memory_errors", "plan_batches",
]  # fmt: skip

Reference = Callable[[PairBatch, PairGram], tuple[Tensor, Tensor]]
"""From a batch and its measurement to `(ref_chosen_logp, ref_rejected_logp)`, float64 `[B]` each."""

Block = dict[str, Any]
"""What one batch gave, as JSON: `positions` of its pairs and, a number each, the entries of `PairGram` and the
reference's log-probs (absent without a reference); `modules` as in `BatchResults`; `coverage`."""

ENTRIES = ("chosen_sq", "rejected_sq", "inner", "chosen_logp", "rejected_logp", "chosen_len", "rejected_len")
REFERENCES = ("ref_chosen_logp", "ref_rejected_logp")


@dataclass(frozen=True, kw_only=True)
class BatchResults:
    """What batches of P pairs measured."""

    # `position` among all pairs, increasing; `ENTRIES`; and `REFERENCES` where there is a reference; `[P]` each.
    table: Table
    # module -> [inner_m / (‖g_w‖‖g_l‖), chosen_sq_m / ‖g_w‖², rejected_sq_m / ‖g_l‖²], each summed over the pairs whose
    # cosine is defined; empty unless asked for.
    modules: dict[str, Floats]
    coverage: float


def itself(batch: PairBatch, gram: PairGram) -> tuple[Tensor, Tensor]:
    """The model as its own reference, as at the first step of training."""
    return gram.chosen_logp, gram.rejected_logp


def adapter_off(model: Any) -> Reference:
    """The base model under a PEFT adapter as the reference, as in TRL."""

    def reference(batch: PairBatch, gram: PairGram) -> tuple[Tensor, Tensor]:
        with model.disable_adapter():
            return sequence_logps(model, batch)

    return reference


def plan_batches(pairs: Sequence[AuditPair], batch_size: int) -> list[list[int]]:
    """Group pairs of like length, longest first: little padding, and what does not fit in memory fails at once."""
    order = sorted(range(len(pairs)), key=lambda position: -pairs[position].longest)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def measure_batches(
    model: Any, pairs: Sequence[AuditPair], batches: Sequence[Sequence[int]], *, reference: Reference | None = None,
    **options: Any,
) -> Iterator[Block]:  # fmt: skip
    """What `measure` with these options gives of each batch, and the reference's log-probs; an error names the row."""
    for positions in batches:
        chunk = [pairs[position] for position in positions]
        gram, references = _measure_batch(model, chunk, reference, options)
        yield {
            "positions": list(positions), **{name: getattr(gram, name).tolist() for name in ENTRIES},
            **{name: values.tolist() for name, values in zip(REFERENCES, references, strict=False)},
            "modules": _module_sums(gram), "coverage": gram.coverage,
        }  # fmt: skip


def measure_reference(model: Any, pairs: Sequence[AuditPair], batches: Sequence[Sequence[int]]) -> Iterator[Block]:
    """The log-probs of a reference model alone, of each batch; an error names the row."""
    for positions in batches:
        chunk = [pairs[position] for position in positions]
        with memory_errors(chunk):
            references = sequence_logps(model, batch_of(chunk))
        check_reference(chunk, references)
        yield {name: values.tolist() for name, values in zip(REFERENCES, references, strict=True)}


def join_blocks(blocks: Sequence[Mapping[str, Any]]) -> BatchResults:
    """Put what batches gave together, whatever order they come in; at least one block."""
    names = [*ENTRIES, *(name for name in REFERENCES if name in blocks[0])]
    table = stack(
        [Table.read({"position": block["positions"], **{name: block[name] for name in names}}) for block in blocks]
    )
    modules: dict[str, Floats] = {}
    for block in blocks:
        for name, sums in block["modules"].items():
            modules[name] = modules.get(name, 0.0) + np.array(sums)
    coverage = min(float(block["coverage"]) for block in blocks)
    return BatchResults(table=table.select(np.argsort(table["position"])), modules=modules, coverage=coverage)


def _measure_batch(
    model: Any, chunk: Sequence[AuditPair], reference: Reference | None, options: Mapping[str, Any]
) -> tuple[PairGram, tuple[Tensor, ...]]:
    batch = batch_of(chunk)
    try:
        with memory_errors(chunk):
            gram = measure(model, batch, **options)
            references = () if reference is None else reference(batch, gram)
    except NonFiniteError as error:
        if len(chunk) > 1:  # one by one, to tell which
            for pair in chunk:
                _measure_batch(model, [pair], reference, options)
        raise NonFiniteError(f"{', '.join(pair.where for pair in chunk)}: {error}") from error
    check_reference(chunk, references)  # `measure` has refused what is not finite in its own numbers
    return gram, references


@contextmanager
def memory_errors(chunk: Sequence[AuditPair]) -> Iterator[None]:
    """Say what to do where a batch takes more memory than there is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GradentError(
            f"The device ran out of memory on a batch of {len(chunk)} pairs of up to {chunk[0].longest} tokens (the "
            f"longest at {chunk[0].where}). Try a smaller --batch-size, --memory-budget or --max-length, or --dtype "
            "bfloat16."
        ) from error


def check_reference(chunk: Sequence[AuditPair], references: Sequence[Tensor]) -> None:
    """Refuse log-probs of a reference that are nan or inf, naming the row."""
    if not references:
        return
    finite = torch.stack(list(references)).isfinite().all(0)
    if not bool(finite.all()):
        where = chunk[int(finite.int().argmin())].where
        raise NonFiniteError(
            f"{where}: a log-prob of this pair under the reference is nan or inf. Try --dtype float32 (or float64); if "
            "it stays, the reference's weights are damaged, or the row must be left out."
        )


def _module_sums(gram: PairGram) -> dict[str, list[float]]:
    defined = (gram.chosen_sq > 0) & (gram.rejected_sq > 0)
    scales = torch.stack([(gram.chosen_sq * gram.rejected_sq).sqrt(), gram.chosen_sq, gram.rejected_sq])[:, defined]
    return {
        name: (torch.stack([inner, chosen_sq, rejected_sq])[:, defined] / scales).sum(1).tolist()
        for name, (chosen_sq, rejected_sq, inner) in (gram.modules or {}).items()
    }
