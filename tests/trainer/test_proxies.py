"""`proxies=True` takes the stand-ins of the very pairs that a step measures, with the weights of that step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback, PairGram, proxies
from gradent.pairs.batch import PairBatch
from gradent.trainer.records.proxies import join_proxies, summarize_proxies
from tests.trainer.runs import llama, make_trainer, with_lora


@pytest.mark.parametrize("lora", [False, True])
def test_the_stand_ins_of_a_step_are_those_of_its_pairs(
    lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = with_lora(llama()) if lora else llama()
    found: list[proxies.PairProxies] = []

    class Before(EntanglementCallback):
        """Measures what is to be found while the weights are those of the step."""

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            was_armed = self._recorder.armed  # before the optimizer's step it is called once more, to no effect
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            if not was_armed:
                return
            assert self._pending is not None and self._pending.batch is not None
            found.append(proxies.measure_proxies(kwargs["model"], self._pending.batch))

    callback = Before(every=1, proxies=True, on_error="raise")
    trainer = make_trainer("dpo", model, tiny_tokenizer, tmp_path, [callback], max_steps=2)
    trainer.train()
    assert len(callback.records) == len(found) == 2
    for record, true in zip(callback.records, found, strict=True):
        assert torch.equal(record.proxies.ches, true.ches)
        assert torch.equal(record.proxies.head.inner, true.head.inner)
        assert torch.allclose(record.proxies.chosen_logp, record.gram.chosen_logp, rtol=1e-5)
    (logged, *_) = [logs for logs in trainer.state.log_history if "gradent/proxy/ches" in logs]
    assert logged["gradent/proxy/ches"] == pytest.approx(float(found[0].ches.mean()))
    assert logged["gradent/proxy/head_cosine"] == pytest.approx(float(found[0].head.cosine.mean()))


def test_where_there_are_none_it_is_said_and_the_step_kept(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = EntanglementCallback(every=1, proxies=True, on_error="raise")
    make_trainer("kto", llama(), tiny_tokenizer, tmp_path, [callback], max_steps=2).train()
    assert len(callback.records) == 2 and callback.errors == 0
    assert caplog.text.count("gradent takes no stand-ins (proxies=True): they are of pairs") == 1


def test_rank_correlations_take_ten_pairs() -> None:
    model = llama()
    batch = PairBatch.from_tokens([([5, 7 + n], [9 + n, 12], [30, 2 * n + 3]) for n in range(12)])
    part = proxies.measure_proxies(model, batch)
    gram = PairGram(
        chosen_sq=torch.ones(12), rejected_sq=torch.ones(12), inner=part.ches.argsort().argsort().double() / 12,
        chosen_logp=part.chosen_logp, rejected_logp=part.rejected_logp, chosen_len=part.chosen_len,
        rejected_len=part.rejected_len,
    )  # fmt: skip
    assert summarize_proxies([(gram, part)])["gradent/proxy/ches/spearman"] == pytest.approx(1.0)
    few = [(gram.select([0, 1, 2]), proxies.measure_proxies(model, batch.select([0, 1, 2])))]
    assert "gradent/proxy/ches/spearman" not in summarize_proxies(few)
    joined = join_proxies([part, part])
    assert joined is not None and torch.equal(joined.ches, torch.cat([part.ches, part.ches]))
    assert join_proxies([part, None]) is None and join_proxies([]) is None
