"""One loading behind every command: each format of rows, in each kind of file, gives all of them the same token ids."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradent import audit, scan
from gradent.auditing.pair_tokens import TokenAudit, audit_tokens
from gradent.auditing.state.config import TokenConfig
from gradent.loading.preference_files import Row
from gradent.loading.preferences import prepare_pairs
from gradent.pairs.preparation import Preparation
from gradent.record import read_pairs
from gradent.record.scans import read_scan
from gradent.trainer.callback.probe import Probe
from tests.auditing.made import FORMATS, KINDS, logp

Responses = list[tuple[list[int], list[int], list[int]]]  # prompt, chosen, rejected

# Every format, and every kind of file with some format.
CASES = list(
    itertools.islice(zip(itertools.cycle(FORMATS), itertools.cycle(KINDS), strict=False), max(len(FORMATS), len(KINDS)))
)


def expected(rows: list[dict], tokenizer) -> Responses:
    """By the preparation alone, which tests/loading/test_preferences.py holds against TRL's own."""
    numbered = [Row(index=number, where=f"row {number}", values=row) for number, row in enumerate(rows)]
    pairs = prepare_pairs(numbered, tokenizer, Preparation.of_release(None)).pairs
    return [(list(pair.prompt_ids), list(pair.chosen_ids), list(pair.rejected_ids)) for pair in pairs]


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_every_command_sees_the_same_tokens(form: str, kind: str, local_model: Path, tmp_path: Path) -> None:
    rows = FORMATS[form]
    data = tmp_path / kind
    KINDS[kind](data, rows)
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    model = AutoModelForCausalLM.from_pretrained(local_model, dtype="float32").eval()
    want = expected(rows, tokenizer)
    logps = [[logp(model, prompt, side) for side in sides] for prompt, *sides in want]
    lengths = [[len(side) for side in sides] for _, *sides in want]

    audited = read_pairs(
        audit(local_model, data, out=tmp_path / "audit", attribution=False, report=False, quiet=True).pairs_path
    ).to_pydict()
    scanned = read_scan(
        scan(local_model, data, out=tmp_path / "scan", exact=2, report=False, quiet=True).scan_path
    ).to_pydict()
    for found in (audited, scanned):
        by_row = sorted(zip(found["pair"], found["chosen_logp"], found["rejected_logp"], strict=True))
        assert [list(each[1:]) for each in by_row] == [pytest.approx(each, rel=1e-5) for each in logps]
        by_row = sorted(zip(found["pair"], found["chosen_len"], found["rejected_len"], strict=True))
        assert [list(each[1:]) for each in by_row] == lengths

    for row, (prompt, *sides) in enumerate(want):
        config = TokenConfig(model=str(local_model), data=str(data), pair=row, out=tmp_path / "tokens", quiet=True)
        told = audit_tokens(config)
        assert isinstance(told, TokenAudit)
        assert told.record["prompt"]["ids"] == prompt
        assert [told.record[side]["ids"] for side in ("chosen", "rejected")] == sides  # type: ignore[literal-required]

    probe = Probe(rows, every=1)
    probe.prepare(tokenizer, SimpleNamespace(max_length=None))
    batch = vars(probe)["_batch"]
    assert batch is not None and [batch.chosen_len.tolist(), batch.rejected_len.tolist()] == [
        list(side) for side in zip(*lengths, strict=True)
    ]
    for place, (prompt, *sides) in enumerate(want):
        for half, side in enumerate(sides):
            line = place + half * len(want)
            ids = batch.input_ids[line][batch.attention_mask[line].bool()].tolist()
            assert ids == [*prompt, *side]
