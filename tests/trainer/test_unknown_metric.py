"""`metric="adam"` in a trainer whose optimizer is none that gradent knows: Euclidean products, and one sentence."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback
from tests.trainer.runs import llama, make_trainer
from tests.truth import TOLERANCE, scaled_error, truth

NEEDS = {"adamw_8bit": "bitsandbytes", "galore_adamw": "galore_torch", "apollo_adamw": "apollo_torch"}
NAMES = {
    "adafactor": "transformers.Adafactor", "rmsprop": "RMSprop", "adamw_8bit": "bitsandbytes.AdamW",
    "galore_adamw": "galore_torch.AdamW", "apollo_adamw": "apollo_torch.AdamW",
}  # fmt: skip


@pytest.mark.parametrize("optim", list(NAMES))
def test_products_are_euclidean(
    optim: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if optim in NEEDS:
        pytest.importorskip(NEEDS[optim])
    options = (
        {"optim_target_modules": ["q_proj"], "optim_args": "rank=1"} if "mw_8" not in optim and "_a" in optim else {}
    )
    model = llama()
    before = llama()
    callback = EntanglementCallback(every=1, metric="adam")
    trainer = make_trainer(
        "dpo", model, tiny_tokenizer, tmp_path, [callback], optim=optim, learning_rate=0.0, **options
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert [record.step for record in callback.records] == [1, 2]
    assert callback.errors == 0
    for record in callback.records:
        assert record.batch is not None
        assert scaled_error(record.gram, truth(before, record.batch)) <= TOLERANCE["float32"]
    told = [each.message for each in caplog.records if "in the place of metric='adam'" in each.message]
    assert len(told) == 1
    assert NAMES[optim] in told[0]
