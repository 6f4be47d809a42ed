"""The pairs of a large data set: checked and tokenized a part at a time, held as small as they can be.

A pair keeps its tokens, four bytes each, and where it came from; its texts are gone once they have been counted.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

from gradent.auditing.analysis.properties import pair_properties
from gradent.loading.models import check_vocabulary
from gradent.loading.preference_files import Row, read_rows
from gradent.loading.preferences import AuditPair, PairSet, collect_pairs, describe_prompts, require_usable
from gradent.loading.prepare import Material, read_rules, tell_about_pairs
from gradent.loading.source import ModelSource
from gradent.record.table import Table
from gradent.scanning.config import ScanConfig
from gradent.scanning.digests import data_digest

__all__ = ["ScanMaterial", "read_scan_material"]

PART = 1024
"""Rows that are tokenized before their texts are let go."""

TEXT_COLUMNS = (
    "pair", "where", "prompt_len", "chosen_len", "rejected_len", "shared_prefix", "shared_suffix", "edit_distance",
    "truncated",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScanMaterial:
    """The pairs to scan, and what their tokens alone say of them."""

    material: Material
    text: Table  # `TEXT_COLUMNS`, in the order of the pairs
    digest: str  # of the contents of all rows
    seconds: float  # for the text columns

    @property
    def pairs(self) -> list[AuditPair]:
        """All pairs, by row."""
        return self.material.pairs.pairs

    @property
    def identity(self) -> str:
        """A digest of the rows and their tokens."""
        sums = hashlib.sha256()
        for pair in self.pairs:
            sums.update(f"{pair.row}:{[len(ids) for ids in pair.ids]}".encode())
            for ids in pair.ids:
                sums.update(array("i", ids).tobytes())
        return sums.hexdigest()[:16]


def read_scan_material(source: ModelSource, config: ScanConfig, tell: Callable[[str], None]) -> ScanMaterial:
    """Read, check and tokenize every row of the data."""
    rules = read_rules([source], config, tell)
    rows = read_rows(config.data, config.split)
    digest, count = data_digest(rows), len(rows)
    found, columns = PairSet(pairs=[]), dict[str, list[object]]((name, []) for name in TEXT_COLUMNS)
    used, seconds, notes, is_chat = (-1, ""), 0.0, list[str](), False
    for start in range(0, count, PART):
        part = rows[start : start + PART]
        pairs = collect_pairs(part, rules.tokenizer, rules.whole)
        if not start:
            notes = describe_prompts(part, pairs.pairs)
            is_chat = any(isinstance(part[pair.row - start].values["chosen"], list) for pair in pairs.pairs)
        began = time.perf_counter()
        for pair in pairs.pairs:
            for name, value in _text_columns(pair).items():
                columns[name].append(value)
        seconds += time.perf_counter() - began
        for pair in pairs.pairs:
            used = max(used, (max(max(ids) for ids in pair.ids), pair.where), key=lambda item: item[0])
        found.pairs.extend(map(_compact, pairs.pairs))
        found.skipped.extend(pairs.skipped)
        rows[start : start + PART] = [Row(index=row.index, where=row.where) for row in part]  # the texts go
    require_usable(found, count, skip_bad_rows=config.skip_bad_rows)
    check_vocabulary(rules.tokenizer, rules.vocabulary, rules.source.base, used)
    tell_about_pairs(found, count, rules.how, config.seed, tell)
    for note in [*notes, *([rules.date_note] if rules.date_note and is_chat else [])]:
        tell(note)
    material = Material(
        tokenizer=rules.tokenizer, pairs=found, rows=count, max_length=rules.max_length, add_eos=rules.add_eos,
        used=used, how=rules.how,
    )  # fmt: skip
    return ScanMaterial(material=material, text=Table.read(columns), digest=digest, seconds=seconds)


def _text_columns(pair: AuditPair) -> dict[str, object]:
    return {
        "pair": pair.row, "where": pair.where, "prompt_len": len(pair.prompt_ids), "chosen_len": len(pair.chosen_ids),
        "rejected_len": len(pair.rejected_ids), "truncated": pair.truncated,
        **pair_properties(pair.chosen_ids, pair.rejected_ids),
    }  # fmt: skip


def _compact(pair: AuditPair) -> AuditPair:
    other = pair.rejected_prompt_ids
    return replace(
        pair, prompt_ids=array("i", pair.prompt_ids), chosen_ids=array("i", pair.chosen_ids),
        rejected_ids=array("i", pair.rejected_ids), chosen_text="", rejected_text="", prompt_text="",
        rejected_prompt_ids=None if other is None else array("i", other),
    )  # fmt: skip
