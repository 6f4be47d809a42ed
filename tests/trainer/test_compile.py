"""`torch_compile=True`: the same records as without, and the same weights as unwatched."""

from __future__ import annotations

import copy

import pytest
import torch

from gradent import EntanglementCallback
from tests.trainer.test_any_release import train


@pytest.mark.nightly
@pytest.mark.slow
def test_a_compiled_model(tiny_llama, tiny_tokenizer, tmp_path, caplog):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    callback, eager = (EntanglementCallback(every=1, on_error="raise") for _ in range(2))
    watched = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [callback], **compiled)
    bare = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [], **compiled)
    train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [eager])
    pairs = zip(watched.model.parameters(), bare.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert [record.source for record in callback.records] == ["measure"] * 3
    assert sum("the model is compiled" in message for message in caplog.messages) == 1
    for one, other in zip(callback.records, eager.records, strict=True):
        torch.testing.assert_close(one.gram.cosine, other.gram.cosine, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.verdict.d_w, other.verdict.d_w, rtol=1e-3, atol=1e-6)
