"""`tokens_every`: the token matrix of the step's most entangled pair, at the weights that the step started from."""

from __future__ import annotations

import copy

import pytest
import torch

from gradent import EntanglementCallback
from gradent.errors import InputError
from gradent.tokens.matrix import measure_tokens
from gradent.trainer.records.window import to_window
from tests.trainer.test_any_release import train


def test_tokens_of_the_most_entangled_pair(tiny_llama, tiny_tokenizer, tmp_path):
    fresh = copy.deepcopy(tiny_llama)
    callback = EntanglementCallback(every=3, tokens_every=2, on_error="raise")
    watched = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [callback])
    bare = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [])
    pairs = zip(watched.model.parameters(), bare.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert [(record.step, record.tokens is not None) for record in callback.records] == [
        (1, True),
        (2, True),
        (3, False),
    ]
    first = callback.records[0]
    assert first.tokens.pair == int(first.gram.cosine.argmax())
    (want,) = measure_tokens(fresh, first.batch.select([first.tokens.pair]))
    torch.testing.assert_close(first.tokens.gram.inner, want.inner, rtol=1e-4, atol=1e-5)
    inner = first.gram.inner[first.tokens.pair]
    torch.testing.assert_close(first.tokens.gram.inner.sum(), inner, rtol=1e-4, atol=1e-5)
    shown = to_window(list(callback.records), tiny_tokenizer).tokens
    assert shown.step == 2
    assert len(shown.chosen) == len(shown.cosines)
    assert len({*shown.chosen}) == len(shown.chosen)
    assert all(len(row) == len(shown.rejected) for row in shown.cosines)


@pytest.mark.parametrize("tokens_every", [-1, 0.5, None])
def test_nonsense_is_refused(tokens_every):
    with pytest.raises(InputError, match="tokens_every"):
        EntanglementCallback(tokens_every=tokens_every)
