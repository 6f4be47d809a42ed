"""Pairwise normalized runs: what a step does to the log-probs, DDP, resuming, and TRL's trainer in all the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback
from gradent.measurement import sequence_logps
from gradent.pairs.batch import PairBatch
from tests.auditing.trained import make_base
from tests.trainer import rank_pairwise
from tests.trainer.runs import data_for, llama, weights_of, with_lora
from tests.trainer.test_pairwise import error, make
from tests.trainer.test_ranks import two_and_one


def entangled() -> Dataset:
    """Pairs whose rejected response says what chosen says, several times over: its gradient is along and longer."""
    words = ("yes", "rain", "a door", "no")
    return Dataset.from_list(
        [{"prompt": f"Q{n}?", "chosen": f" {words[n % 4]}.", "rejected": f" {words[n % 4]}" * 4} for n in range(8)]
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_condition_2_holds_for_every_pair(lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def run(plain: bool) -> list[Any]:
        model = with_lora(llama()) if lora else llama()
        callback = EntanglementCallback(every=1, realised=True, on_error="raise", alert=None)
        make(
            model, tiny_tokenizer, tmp_path, ref=None if lora else llama(seed=3), plain=plain, data=entangled(),
            callbacks=[callback], per_device_train_batch_size=1, max_steps=8, learning_rate=1e-5,
        ).train()  # fmt: skip
        return list(callback.records)

    records = run(plain=False)
    assert [record.source for record in records] == ["piggyback"] * 8
    for record in records:
        assert record.verdict.case.tolist() == [1]
        assert float(record.verdict.chosen_change) > 0 > float(record.verdict.rejected_change)
        want = (record.gram.rejected_sq / record.gram.chosen_sq).sqrt()
        assert torch.allclose(record.verdict.weight_ratio, want, rtol=1e-5)
        assert float(record.chosen_realised) > 0 > float(record.rejected_realised)
    theirs = run(plain=True)  # the same pairs under DPO, so that the test can fail
    assert sum(int(record.verdict.case) == 1 for record in theirs) < 8


def test_saved_and_resumed_to_the_bit(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    trainers = [make(llama(), tiny_tokenizer, tmp_path / "run", ref=llama(seed=3), **options) for _ in range(2)]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    ours, theirs = (weights_of(trainer.model) for trainer in trainers)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_rest_is_dpo(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Evaluation and the first step's logs are TRL's; training logs the pairs' figures beside them."""
    logs = []
    for plain in (False, True):
        trainer = make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3), plain=plain, max_steps=1)
        before = trainer.evaluate(data_for("dpo", 4))
        trainer.train()
        first = next(entry for entry in trainer.state.log_history if "loss" in entry)
        logs.append((before, first))
    timed = ("runtime", "per_second")
    evaluated = [{k: v for k, v in before.items() if not any(word in k for word in timed)} for before, _ in logs]
    assert {"eval_loss", "eval_rewards/margins"} <= set(evaluated[0])
    assert evaluated[0] == evaluated[1]
    assert not any("pairwise" in key for key in evaluated[0])
    ours, theirs = (first for _, first in logs)
    same = [key for key in theirs if key != "grad_norm"]
    assert {"loss", "rewards/chosen", "logps/rejected"} <= set(same)
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    names = ("chosen_norm", "rejected_norm", "cosine", "weight_ratio", "zero_norm", "reversed")
    assert set(ours) - set(theirs) == {f"pairwise/{name}" for name in names}


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "checkpointing"])
def test_to_the_bit_with_a_callback(recomputed: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    callback = EntanglementCallback(every=1, on_error="raise", alert=None)
    finals = []
    for callbacks in ([callback], []):
        trainer = make(
            with_lora(llama()), tiny_tokenizer, tmp_path, callbacks=callbacks, activation_checkpointing=recomputed
        )
        trainer.train()
        finals.append(weights_of(trainer.model))
    assert [name for name in finals[0] if not torch.equal(finals[0][name], finals[1][name])] == []
    assert [record.source for record in callback.records] == ["piggyback"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_two_ranks_are_one_process(kind: str, tmp_path: Path) -> None:
    two, other, one = two_and_one(rank_pairwise.main, tmp_path, kind)
    assert two["moved"] == other["moved"]
    moves = [torch.tensor(run["moved"], dtype=torch.float64) for run in (two, one)]
    assert float(moves[1].norm()) > 1e-2
    assert error(*moves) <= 2e-5  # differences of weights, rounded in float32
    assert two["logs"][0] == pytest.approx(one["logs"][0], rel=1e-5)


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2,
    "initializer_range": 0.02, "eos_token_id": 1,
}  # fmt: skip


def entangled_words() -> list[dict[str, str]]:
    """Nine pairs in the words of `make_base`'s tokenizer; rejected says the end of chosen three times."""
    things, ends = ("film", "soup", "book"), ("truly good .", "quite warm .", "a quiet joy !")
    words = zip(things, ("bright", "warm", "good"), ("dull", "cold", "bad"), strict=True)
    return [
        {"prompt": f"the {thing} was", "chosen": f" {good} {end}", "rejected": f" {bad} {end} {end} {end}"}
        for thing, good, bad in words
        for end in ends
    ]


def tune(model: nn.Module, batch: PairBatch, steps: int) -> None:
    """A little supervised training on chosen and rejected alike, so that the log-probs are a language model's."""
    labels = batch.input_ids.masked_fill(batch.completion_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_chosen_rises_where_it_falls_under_dpo(tmp_path: Path) -> None:
    """Plain SGD, rejected three times as long as chosen: a setting found on other seeds, with another model.

    On seeds 30 to 41, tried once: under DPO chosen fell in all twelve (0.5 to 3.4 nats), here it rose in eleven. It is
    no law, since Condition 2 is about a pair's own small step: under AdamW (1e-3, ten steps, seeds 30 to 35) chosen
    fell here too, by 0.6 to 2.1 nats where DPO took 3.8 to 4.4.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(make_base(tmp_path / "base"))
    rows = entangled_words()
    columns = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
    batch = PairBatch.from_text(tokenizer, *columns, max_length=64)
    for seed in (20, 22, 24):
        base = llama(seed, **SIZES, vocab_size=len(tokenizer))
        tune(base, batch, 10)
        before, changes = sequence_logps(base, batch), {}
        for plain in (False, True):
            trainer = make(
                copy.deepcopy(base), tokenizer, tmp_path, ref=copy.deepcopy(base), plain=plain,
                data=Dataset.from_list(rows), per_device_train_batch_size=9, learning_rate=0.02,
                max_steps=30, seed=seed,
            )  # fmt: skip
            trainer.train()
            after = sequence_logps(trainer.model, batch)
            changes[plain] = [float((new - old).mean()) for new, old in zip(after, before, strict=True)]
        assert changes[False][0] > 0 > changes[False][1], changes
        assert changes[True][0] < 0, changes
