"""The callback under every release of TRL and transformers that is admitted: what `make test-oldest` runs as well."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from gradent import EntanglementCallback
from gradent.trainer.callback.implied_rows import implied_rows
from tests.trainer.kinds import KINDS, configurations
from tests.trainer.rollouts import make_rollouts, reward
from tests.trainer.row_truth import assert_rows, names_of, texts
from tests.truth import scaled_error, truth

ROWS = [
    {"prompt": f"Question {n}:", "chosen": f" yes, {'very ' * (n % 3)}much", "rejected": f" no{'!' * (n % 4)}"}
    for n in range(8)
]


IN_PLACE = Version("1.0") <= Version(trl.__version__) < Version("1.10")
"""Whether this release divides a rollout's logits in place, so that nothing can be read off them."""


def train(model: nn.Module, tokenizer: Any, out: Path, callbacks: list[Any], **settings: Any) -> DPOTrainer:
    """Three steps of DPO; settings that a release does not know are left out."""
    wanted = {
        "output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
        "max_length": 64, "disable_tqdm": True, "seed": 3, **settings,
    }  # fmt: skip
    known = inspect.signature(DPOConfig).parameters
    torch.manual_seed(0)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(**{name: value for name, value in wanted.items() if name in known}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_dpo(tiny_llama, tiny_tokenizer, tmp_path, checkpointing, accumulation):
    settings = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": accumulation}
    callback = EntanglementCallback(every=1, on_error="raise")
    fresh = copy.deepcopy(tiny_llama)
    watched = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [callback], **settings)
    bare = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [], **settings)
    pairs = zip(watched.model.parameters(), bare.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert [record.source for record in callback.records] == ["piggyback"] * 3
    first = callback.records[0]
    assert len(first.gram) == 2 * accumulation
    assert scaled_error(first.gram, truth(fresh, first.batch)) <= 1e-5
    # At the first step the policy is its reference: d_w = d_l = β σ(0).
    torch.testing.assert_close(first.verdict.d_w, torch.full_like(first.verdict.d_w, 0.05), rtol=1e-4, atol=0)
    torch.testing.assert_close(first.verdict.d_l, first.verdict.d_w, rtol=1e-4, atol=0)
    logged = [entry for entry in watched.state.log_history if "gradent/cosine" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]


def test_padding_free(tiny_llama, tiny_tokenizer, tmp_path):
    """All responses of a batch in one row, where the release has it; one that has not pads them, and says so."""
    callback = EntanglementCallback(every=1, on_error="raise")
    fresh = copy.deepcopy(tiny_llama)
    watched = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [callback], padding_free=True)
    bare = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [], padding_free=True)
    pairs = zip(watched.model.parameters(), bare.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert [record.source for record in callback.records] == ["piggyback"] * 3
    first = callback.records[0]
    assert len(first.gram) == 2
    assert scaled_error(first.gram, truth(fresh, first.batch)) <= 1e-5
    torch.testing.assert_close(first.verdict.d_w, torch.full_like(first.verdict.d_w, 0.05), rtol=1e-4, atol=0)
    assert callback.records[2].attribution is not None


def test_a_mixture(tiny_tokenizer, tmp_path):
    """Trained in full, without the auxiliary loss: in some releases experts are modules, in others one weight."""
    config = MixtralConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    fresh = MixtralForCausalLM(config).eval()
    callback = EntanglementCallback(every=1, realised=True, on_error="raise")
    # A small rate: a router's choice jumps, which no first order foretells.
    settings = {"router_aux_loss_coef": 0.0, "learning_rate": 1e-5}
    watched = train(copy.deepcopy(fresh), tiny_tokenizer, tmp_path, [callback], **settings)
    bare = train(copy.deepcopy(fresh), tiny_tokenizer, tmp_path, [], **settings)
    pairs = zip(watched.model.parameters(), bare.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert [record.source for record in callback.records] == ["piggyback"] * 3
    first, _, last = callback.records
    assert scaled_error(first.gram, truth(fresh, first.batch)) <= 1e-5
    assert last.attribution is not None and last.attribution.explained > 0.9


def test_what_did_not_move_is_not_said_to_have_moved(tiny_llama, tiny_tokenizer, tmp_path):
    """With a learning rate of zero nothing moves, whatever noise dropout puts on the training forward."""
    tiny_llama.config.attention_dropout = 0.3
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.3
    callback = EntanglementCallback(every=1, realised=True, on_error="raise")
    train(tiny_llama, tiny_tokenizer, tmp_path, [callback], learning_rate=0.0, disable_dropout=False)
    for record in callback.records:
        assert record.chosen_realised.abs().max() == 0
        assert record.rejected_realised.abs().max() == 0


def test_every_trainer_is_known():
    """`KINDS` says of each trainer of this release what its rows are, and its configuration implies that."""
    found = {name: implied_rows(object.__new__(kind)) for name, kind in configurations().items()}
    assert set(found) - set(KINDS) == set()
    for name, implied in found.items():
        if KINDS[name] in ("refusal", "no trainer"):
            assert (implied.refusal is not None) == (KINDS[name] == "refusal")
        else:
            assert implied.groups == {"pairs": None, "groups": "prompts", "batch": "batch"}[KINDS[name]]
            assert implied.refusal is None and (implied.pairing == "rows") == (KINDS[name] != "pairs")


class Gradients(TrainerCallback):
    """Keeps the weights before each step and the gradient that it gets."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = kwargs["model"]
        grads = {name: part.grad.clone() for name, part in model.named_parameters()}
        self.seen.append(({name: part.clone() for name, part in model.state_dict().items()}, grads))


@pytest.mark.parametrize("kinds", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)], ids=["GRPO", "RLOO"])
def test_rollouts(tiny_llama, tiny_tokenizer, tmp_path, caplog, kinds):
    """Releases differ in who divides logits by the temperature, and in whether the model hears of labels."""
    tiny_tokenizer.model_input_names = ["input_ids", "attention_mask"]
    callback, gradients = EntanglementCallback(every=1, on_error="raise"), Gradients()
    before, bare, watched = (copy.deepcopy(tiny_llama) for _ in range(3))
    for model, callbacks in ((bare, []), (watched, [callback, gradients])):
        make_rollouts(kinds, model, tiny_tokenizer, tmp_path, callbacks, beta=0.0).train()
    pairs = zip(watched.parameters(), bare.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    if IN_PLACE:
        assert "changed in place" in caplog.text and not callback.records
        return
    assert [record.step for record in callback.records] == [1, 2]
    for record, (weights, grads) in zip(callback.records, gradients.seen, strict=True):
        before.load_state_dict(weights)
        assert record.source == "piggyback" and (record.groups, record.flat_groups) == (2, 0)
        assert_rows(record, before, grads, lr=0.05, temperature=0.7)
        prompts = [prompt for prompt, _ in texts(record, tiny_tokenizer)]
        order = list(dict.fromkeys(prompts))
        assert record.rows.group.tolist() == [order.index(prompt) for prompt in prompts]


def test_a_group_without_contrast(tiny_llama, tiny_tokenizer, tmp_path):
    def flat(prompts, completion_ids, **_):
        scores = reward(completion_ids)
        return [0.5 if prompt == prompts[0] else score for prompt, score in zip(prompts, scores, strict=True)]

    tiny_tokenizer.model_input_names = ["input_ids", "attention_mask"]
    callback, options = EntanglementCallback(every=1, on_error="raise"), {"reward_funcs": flat}
    kinds = (GRPOTrainer, GRPOConfig)
    make_rollouts(kinds, tiny_llama, tiny_tokenizer, tmp_path, [callback], options=options, beta=0.0).train()
    for record in callback.records:
        assert len(record.rows) == 4 and (record.inactive, record.groups, record.flat_groups) == (4, 1, 1)


def test_sft(tiny_llama, tiny_tokenizer, tmp_path, caplog):
    callback = EntanglementCallback(every=1, on_error="raise", out=tmp_path / "records")
    data = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in ROWS])
    with caplog.at_level(logging.WARNING, "gradent"):
        trainer = make_rollouts(
            (SFTTrainer, SFTConfig), tiny_llama, tiny_tokenizer, tmp_path, [callback], options={}, data=data
        )
        trainer.train()
    (said,) = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert "nothing to say in SFTTrainer" in said and "every row is pushed up" in said
    assert not callback.records and not names_of(trainer.state.log_history) and not (tmp_path / "records").exists()
