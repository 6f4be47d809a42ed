"""The stages of a scan, batch after batch, each finding into the journal: what is there is not done again.

Letters: P pairs of the exact sample, K numbers of a row's vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from gradent.auditing.analysis.columns import judge
from gradent.auditing.measuring.batches import ENTRIES, REFERENCES, measure_batches, measure_reference, plan_batches
from gradent.auditing.measuring.steps import measure_along, measure_vectors, sample_gradient
from gradent.auditing.state.journal import Journal
from gradent.auditing.state.targets import ReferenceChoice
from gradent.distributed import Ranks
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.loading.preferences import AuditPair, draw_in_slices
from gradent.loading.prepare import describe_model, open_model
from gradent.loading.source import ModelSource, read_step
from gradent.record.json_lines import digest
from gradent.record.table import Floats, Table
from gradent.scanning.batches import scan_batches
from gradent.scanning.config import ScanConfig
from gradent.scanning.material import ScanMaterial

__all__ = ["Scan", "exact_sample"]

Advance = Callable[[int, int], None]
Part = TypeVar("Part")

SAMPLE = "sample"


def exact_sample(pairs: Sequence[AuditPair], count: int | None, seed: int) -> list[int]:
    """Positions of the pairs that are measured exactly, increasing: one of each of so many slices of like length."""
    if count == 0:
        return []
    return sorted(positions[0] for positions in draw_in_slices([pair.tokens for pair in pairs], count, seed))


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The measuring of one scan: every rank has one, and measures its share of the batches."""

    config: ScanConfig
    source: ModelSource
    material: ScanMaterial
    reference: ReferenceChoice
    journal: Journal  # of this rank
    ranks: Ranks
    device: str
    model_identity: str  # a digest of the model's files
    tell: Callable[[str], None]  # takes notes

    @cached_property
    def batches(self) -> list[list[int]]:
        """Positions of the pairs of each batch."""
        return plan_batches(self.material.pairs, self.config.batch_size)

    @cached_property
    def sample(self) -> list[int]:
        """Positions of the exact sample among the pairs."""
        return exact_sample(self.material.pairs, self.config.exact, self.config.seed)

    @cached_property
    def sample_pairs(self) -> list[AuditPair]:
        """The exact sample."""
        return [self.material.pairs[position] for position in self.sample]

    @cached_property
    def sample_batches(self) -> list[list[int]]:
        """Positions within the sample of each batch of it."""
        return plan_batches(self.sample_pairs, self.config.batch_size)

    @cached_property
    def sample_identity(self) -> str:
        """A digest of the model's files and of which pairs are the sample."""
        return digest([self.model_identity, self.sample])

    def measure_reference(self, advance: Advance) -> None:
        """The log-probs of a reference that is a model of its own."""
        if self.reference.source is None:
            return
        pairs, identity = self.material.pairs, self.reference.identity
        missing = self._missing("reference", identity, pairs, self.batches, advance)
        if not missing:
            return
        model = self._open(self.reference.source, trainable=False)
        blocks = measure_reference(model, pairs, [self.batches[number] for number in missing])
        self._keep("reference", identity, missing, blocks, pairs, self.batches, advance)

    def scan(self, advance: Advance) -> None:
        """The stand-ins of every pair."""
        pairs, identity = self.material.pairs, self._scan_identity
        missing = self._missing("scan", identity, pairs, self.batches, advance)
        if not missing:
            return
        blocks = scan_batches(
            self._model, pairs, [self.batches[number] for number in missing], head=self.config.head,
            adapter_off=self._is_in_place, memory_budget=self.config.memory_budget,
        )  # fmt: skip
        self._keep("scan", identity, missing, blocks, pairs, self.batches, advance)

    def measure_exactly(self, advance: Advance) -> None:
        """The Gram entries of the exact sample."""
        pairs, identity = self.sample_pairs, self.sample_identity
        missing = self._missing("exact", identity, pairs, self.sample_batches, advance)
        if missing:
            blocks = measure_batches(
                self._model, pairs, [self.sample_batches[number] for number in missing],
                memory_budget=self.config.memory_budget,
            )  # fmt: skip
            self._keep("exact", identity, missing, blocks, pairs, self.sample_batches, advance)
        self.ranks.wait()
        self.journal.refresh()

    def measure_steps(self, advance: Advance) -> None:
        """What a step on the exact sample does to its responses, and the vectors that say by whom."""
        pairs, weights = self.sample_pairs, -self.pull(self.sample_table())
        identity = f"{self.sample_identity}-{self.loss_identity}"
        missing = self._missing(SAMPLE, identity, pairs, self.sample_batches, advance)
        if missing:
            found = self._along(self._model, missing, weights)
            self._keep(SAMPLE, identity, missing, found, pairs, self.sample_batches, advance)
        budget = parse_budget(self.config.memory_budget)
        width = max(1, (budget or DEFAULT_BUDGET) // (8 * len(pairs)))
        missing = self._missing("vectors", self.sample_identity, pairs, self.sample_batches, advance)
        if missing:
            batches = [self.sample_batches[number] for number in missing]
            vectors = measure_vectors(self._model, pairs, batches, width=width, memory_budget=budget)
            named = (
                {
                    "positions": self.sample_batches[number], "is_exact": is_exact,
                    "file": self.journal.save(f"{self.sample_identity}-{number}", part),
                }
                for number, (part, is_exact) in zip(missing, vectors, strict=True)
            )  # fmt: skip
            self._keep("vectors", self.sample_identity, missing, named, pairs, self.sample_batches, advance)
        self.ranks.wait()
        self.journal.refresh()

    @property
    def scan_blocks(self) -> list[dict[str, Any]]:
        """The blocks of the scan, those of the reference in them."""
        blocks = self._blocks("scan", self._scan_identity, len(self.batches))
        if self.reference.source is not None:
            references = self._blocks("reference", self.reference.identity, len(self.batches))
            blocks = [
                {**block, **{name: other[name] for name in REFERENCES}, "seconds": {**block["seconds"], **_took(other)}}
                for block, other in zip(blocks, references, strict=True)
            ]
        return blocks

    def sample_table(self) -> Table:
        """The Gram entries, lengths and log-probs of the sample's pairs, in their order, and of the reference."""
        blocks = self._blocks("exact", self.sample_identity, len(self.sample_batches))
        table = _in_order(blocks, ENTRIES)
        references = {name: table[name.removeprefix("ref_")] for name in REFERENCES}  # each model is its own
        if self.reference.kind != "self":
            scanned = _in_order(self.scan_blocks, [name for name in REFERENCES if name in self.scan_blocks[0]])
            references = {name: np.full(table.rows, np.nan) for name in REFERENCES} | dict(scanned.select(self._places))
        return Table({**table, **references})

    def pull(self, table: Table) -> Floats:
        """What a step on the sample's mean loss has of every chosen's and rejected's gradient, `[2, P]`."""
        judged = judge(table, self.config.loss)
        return np.stack([judged.d_w.numpy(), -judged.d_l.numpy()]) / max(1, table.rows)

    @property
    def along(self) -> Floats:
        """`⟨g_i, ∇L⟩` of the sample's responses, `[2, P]`."""
        blocks = self._blocks(SAMPLE, f"{self.sample_identity}-{self.loss_identity}", len(self.sample_batches))
        order = np.argsort(np.concatenate([block["positions"] for block in blocks]))
        return np.concatenate([block["along"] for block in blocks], axis=1)[:, order]

    @property
    def vectors(self) -> tuple[Floats, bool]:
        """Vectors of the sample's gradients, `[2, P, K]`, and whether they are the gradients."""
        blocks = self._blocks("vectors", self.sample_identity, len(self.sample_batches))
        found: Floats | None = None
        for block in blocks:
            part = self.journal.load(block["file"])
            if found is None:
                found = np.empty((2, len(self.sample), part.shape[2]), dtype=part.dtype)
            found[:, block["positions"]] = part
        assert found is not None
        return found, all(block["is_exact"] for block in blocks)

    def seconds(self, kind: str) -> float:
        """Seconds that the ranks spent on one kind of finding on the sample."""
        identity = f"{self.sample_identity}-{self.loss_identity}" if kind == SAMPLE else self.sample_identity
        return sum(float(block["took"]) for block in self._blocks(kind, identity, len(self.sample_batches)))

    @property
    def model_record(self) -> dict[str, Any]:
        """What the record says of the model."""
        return self.journal.find("model", self.model_identity) or {}

    @property
    def loss_identity(self) -> str:
        """The loss and the reference, which a step on the sample hangs on."""
        reference = self.reference.identity if self.reference.source is not None else self.reference.kind
        return f"{self.config.loss!r}-{reference}"

    @property
    def _scan_identity(self) -> str:
        return f"{self.model_identity}{'-head' * self.config.head}{'-off' * self._is_in_place}"

    @property
    def _is_in_place(self) -> bool:
        return self.reference.kind == "adapter_off" and self.reference.source is None

    @cached_property
    def _places(self) -> np.ndarray[Any, Any]:
        return np.array(self.sample, dtype=np.int64)

    @cached_property
    def _model(self) -> Any:
        model = self._open(self.source)
        if self.journal.find("model", self.model_identity) is None:
            description = describe_model(model, self.source, read_step(self.source), self.device)
            self.journal.append("model", self.model_identity, 0, description)
        return model

    def _along(self, model: Any, missing: Sequence[int], weights: Floats) -> Iterator[dict[str, Any]]:
        """The blocks of a step on the sample; the first takes as long as the sample's gradient does, and its own."""
        # Every rank forms the whole gradient: sums over ranks would come in another order, with other last digits.
        gradient = sample_gradient(model, self.sample_pairs, self.sample_batches, weights.T)
        batches = [self.sample_batches[number] for number in missing]
        budget = self.config.memory_budget
        for block in measure_along(model, self.sample_pairs, batches, {SAMPLE: gradient}, memory_budget=budget):
            yield block[SAMPLE]

    def _open(self, source: ModelSource, *, trainable: bool = True) -> Any:
        return open_model(source, self.material.material, self.config, self.device, trainable=trainable)

    def _blocks(self, kind: str, identity: str, count: int) -> list[dict[str, Any]]:
        found = [self.journal.find(kind, identity, number) for number in range(count)]
        blocks = [block for block in found if block is not None]
        assert len(blocks) == count, f"{kind}: {count - len(blocks)} batches are missing"
        return blocks

    def _missing(
        self, kind: str, identity: str, pairs: Sequence[AuditPair], batches: Sequence[Sequence[int]], advance: Advance
    ) -> list[int]:
        """The numbers of this rank's batches that the journal lacks; the others advance by their costs."""
        share = self.ranks.share(len(batches))
        missing = [number for number in share if self.journal.find(kind, identity, number) is None]
        for number in sorted(set(share) - set(missing)):
            advance(*_cost(pairs, batches[number]))
        return missing

    def _keep(
        self, kind: str, identity: str, missing: Sequence[int], blocks: Iterator[dict[str, Any]],
        pairs: Sequence[AuditPair], batches: Sequence[Sequence[int]], advance: Advance,
    ) -> None:  # fmt: skip
        """Write each block down as it comes, with the seconds it took."""
        for number, (block, took) in zip(missing, _timed(blocks), strict=True):
            self.journal.append(kind, identity, number, {**block, "took": took})
            advance(*_cost(pairs, batches[number]))


def _timed(blocks: Iterator[Part]) -> Iterator[tuple[Part, float]]:
    """Each block with the seconds that it took to make."""
    began = time.perf_counter()
    for block in blocks:
        yield block, time.perf_counter() - began
        began = time.perf_counter()


def _took(block: dict[str, Any]) -> dict[str, float]:
    return {"reference": block["took"]}


def _cost(pairs: Sequence[AuditPair], positions: Sequence[int]) -> tuple[int, int]:
    return len(positions), sum(pairs[position].tokens for position in positions)


def _in_order(blocks: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    """The columns of all blocks, by position."""
    order = np.argsort(np.concatenate([block["positions"] for block in blocks]))
    return Table({name: np.concatenate([np.array(block[name]) for block in blocks])[order] for name in names})
