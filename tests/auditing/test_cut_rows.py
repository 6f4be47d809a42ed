"""An audit of rows that are cut at the start: log-probs of the very tokens that `keep_end` leaves."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradent import audit
from gradent.record import read_pairs
from tests.auditing.made import PAIRS, logp, write_jsonl

LIMIT = 12


def test_rows_that_lost_their_beginning(local_model) -> None:
    data = write_jsonl(local_model.parent / "pairs.jsonl", PAIRS)
    result = audit(
        local_model, data, out=local_model.parent / "out", max_length=LIMIT, truncation_mode="keep_end",
        dtype="float64", token_pairs=2, device="cpu", quiet=True, report=False,
    )  # fmt: skip
    table = read_pairs(result.pairs_path).to_pydict()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(local_model).double(),
        AutoTokenizer.from_pretrained(local_model),
    )
    for place, pair in enumerate(PAIRS):
        start = len(tokenizer(pair["prompt"])["input_ids"])
        for side in ("chosen", "rejected"):
            ids = tokenizer(pair["prompt"] + pair[side] + "<eos>")["input_ids"]
            seam = max(1, start - max(0, len(ids) - LIMIT))  # nothing predicts a row's first token
            ids = ids[-LIMIT:]
            assert table[f"{side}_logp"][place] == pytest.approx(logp(model, ids[:seam], ids[seam:]), rel=1e-6)
    assert result.summary["settings"]["truncation_mode"] == "keep_end"
