"""One pass over all pairs: the numbers are those of `measure`, whatever the batches, and failures name the row."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from gradent import PairBatch, measure
from gradent.auditing.analysis.columns import gram_of
from gradent.auditing.measuring import batches as module
from gradent.auditing.measuring.batches import (
    REFERENCES,
    BatchResults,
    Reference,
    adapter_off,
    itself,
    join_blocks,
    measure_batches,
    measure_reference,
    plan_batches,
)
from gradent.auditing.pipeline import check
from gradent.auditing.state.config import AuditConfig
from gradent.errors import GradentError, InputError, NonFiniteError, NothingTrainableError
from gradent.measurement import sequence_logps
from tests.auditing.made import logp, tokenized

ENTRIES = ("chosen_sq", "rejected_sq", "inner", "chosen_logp", "rejected_logp", "chosen_len", "rejected_len")


PAIRS = [
    tokenized(0, [1, 30, 31], [40, 41], [42]),
    tokenized(1, [1], [50], [51, 52, 53, 54, 55, 56, 57, 58, 59]),
    tokenized(2, [1, 60, 61, 62], [63, 64, 65], [63, 64, 66]),
    tokenized(3, [1, 70], [71], [72]),
    tokenized(5, [1, 80, 81, 82, 83, 84], [85, 86, 87, 88], [89, 90]),
]


def scan_pairs(model: torch.nn.Module, pairs=PAIRS, *, batch_size: int = 8, **options) -> BatchResults:
    """One pass over all pairs; what each batch gave goes through JSON, as in an audit's journal."""
    blocks = measure_batches(model, pairs, plan_batches(pairs, batch_size), **options)
    return join_blocks([json.loads(json.dumps(block)) for block in blocks])


def other_model(model: torch.nn.Module) -> Reference:
    """A model of its own as the reference."""
    return lambda batch, gram: sequence_logps(model, batch)


def references(scan: BatchResults) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(scan.table["ref_chosen_logp"]), torch.from_numpy(scan.table["ref_rejected_logp"])


def whole_batch() -> PairBatch:
    return PairBatch.from_tokens([(each.prompt_ids, each.chosen_ids, each.rejected_ids) for each in PAIRS])


def plain(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    chosen = [logp(model, each.prompt_ids, each.chosen_ids) for each in PAIRS]
    rejected = [logp(model, each.prompt_ids, each.rejected_ids) for each in PAIRS]
    return torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)


@pytest.mark.parametrize("engine", ["hooks", "func"])
@pytest.mark.parametrize("batch_size", [1, 2, 99])
def test_entries_are_those_of_measure(batch_size, engine, tiny_gpt2) -> None:
    found = scan_pairs(tiny_gpt2, PAIRS, batch_size=batch_size, engine=engine)
    found = gram_of(found.table)
    expected = measure(tiny_gpt2, whole_batch())
    for name in ENTRIES:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    with pytest.raises(AssertionError):  # in the order of the rows, not of the batches
        torch.testing.assert_close(found.inner.flip(0), expected.inner, rtol=1e-9, atol=1e-12)


def test_modules_sum_to_the_cosines(tiny_gpt2) -> None:
    found = scan_pairs(tiny_gpt2, PAIRS, batch_size=2, by_module=True)
    gram = gram_of(found.table)
    total = torch.from_numpy(sum(found.modules.values(), np.zeros(3)))
    expected = torch.tensor([float(gram.cosine.sum()), len(PAIRS), len(PAIRS)], dtype=torch.float64)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=0)
    shares = measure(tiny_gpt2, whole_batch(), by_module=True).modules
    assert shares is not None
    assert set(found.modules) == set(shares)
    for name, (chosen_sq, rejected_sq, inner) in shares.items():
        parts = (
            inner / (gram.chosen_sq * gram.rejected_sq).sqrt(),
            chosen_sq / gram.chosen_sq,
            rejected_sq / gram.rejected_sq,
        )
        torch.testing.assert_close(
            torch.from_numpy(found.modules[name]), torch.stack(parts).sum(1), rtol=1e-9, atol=1e-12
        )


def test_no_modules_unless_asked(tiny_gpt2) -> None:
    assert scan_pairs(tiny_gpt2, PAIRS).modules == {}


def test_itself_as_reference(tiny_gpt2) -> None:
    found = scan_pairs(tiny_gpt2, PAIRS, reference=itself, batch_size=2)
    torch.testing.assert_close(references(found), plain(tiny_gpt2), rtol=1e-9, atol=0)


def test_another_model_as_reference(tiny_gpt2, tiny_llama) -> None:
    found = scan_pairs(tiny_gpt2, PAIRS, reference=other_model(tiny_llama.double()), batch_size=2)
    torch.testing.assert_close(references(found), plain(tiny_llama), rtol=1e-6, atol=0)


def test_no_reference(tiny_gpt2) -> None:
    found = scan_pairs(tiny_gpt2, PAIRS)
    assert not set(found.table) & set(REFERENCES)


ADAPTERS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [40, 50, 63]},
}


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
def test_the_adapter_off_as_reference(fields, tiny_llama: LlamaForCausalLM) -> None:
    base = tiny_llama.double()
    off = plain(base)
    config = {"target_modules": ["q_proj", "up_proj"], "r": 4, "init_lora_weights": False, **fields}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config)).eval().double()
    with torch.no_grad():  # what starts at zero or as a copy of the base must differ from it too
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    assert not torch.allclose(plain(model)[0], off[0], rtol=1e-4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    alone = measure(model, whole_batch())
    found = scan_pairs(model, PAIRS, reference=adapter_off(model), batch_size=2)
    torch.testing.assert_close(references(found), off, rtol=1e-6, atol=0)
    # Switching it off and on between batches left what is trainable, and so the measurement, alone.
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    torch.testing.assert_close(gram_of(found.table).inner, alone.inner, rtol=1e-6, atol=1e-9)


def test_batches_hold_pairs_of_like_length_longest_first() -> None:
    batches = plan_batches(PAIRS, 2)
    lengths = [PAIRS[position].longest for positions in batches for position in positions]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(positions) for positions in batches] == [2, 2, 1]
    assert sorted(position for positions in batches for position in positions) == list(range(len(PAIRS)))


def test_batches_can_be_joined_in_any_order_and_in_part(tiny_gpt2) -> None:
    blocks = list(measure_batches(tiny_gpt2, PAIRS, plan_batches(PAIRS, 2), by_module=True))
    whole = join_blocks(blocks).table
    assert whole["position"].tolist() == list(range(len(PAIRS)))
    assert join_blocks(blocks[::-1]).table["inner"].tolist() == whole["inner"].tolist()
    part = join_blocks(blocks[1:]).table
    assert part["position"].tolist() == sorted(position for block in blocks[1:] for position in block["positions"])
    assert part["inner"].tolist() == whole["inner"][part["position"]].tolist()
    assert part["chosen_len"].dtype == np.int64


def test_the_reference_alone(tiny_llama) -> None:
    batches = plan_batches(PAIRS, 2)
    blocks = list(measure_reference(tiny_llama.double(), PAIRS, batches))
    found = {position: at for block, positions in zip(blocks, batches, strict=True) for position, *at in zip(
        positions, block["ref_chosen_logp"], block["ref_rejected_logp"], strict=True
    )}  # fmt: skip
    expected = torch.stack(plain(tiny_llama), dim=1)
    torch.testing.assert_close(
        torch.tensor([found[position] for position in range(len(PAIRS))], dtype=torch.float64),
        expected, rtol=1e-6, atol=0,
    )  # fmt: skip
    spoil(tiny_llama, 64)
    with pytest.raises(NonFiniteError, match=r"^pairs.jsonl:3: .*reference"):
        list(measure_reference(tiny_llama, PAIRS, batches))


def spoil(model: torch.nn.Module, token: int) -> None:
    """Make everything after this token nan."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_nan_is_traced_to_its_row(batch_size, tiny_llama) -> None:
    spoil(tiny_llama, 64)  # inside both responses of row 2
    with pytest.raises(NonFiniteError, match=r"^pairs.jsonl:3: .*non-finite"):
        scan_pairs(tiny_llama, PAIRS, batch_size=batch_size)


def test_a_nan_of_the_reference_is_traced_to_its_row(tiny_gpt2, tiny_llama) -> None:
    spoil(tiny_llama, 64)
    with pytest.raises(NonFiniteError, match=r"^pairs.jsonl:3: .*reference"):
        scan_pairs(tiny_gpt2, PAIRS, reference=other_model(tiny_llama))


def test_running_out_of_memory_says_on_what(tiny_gpt2, monkeypatch) -> None:
    def fail(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(module, "measure", fail)
    with pytest.raises(
        GradentError, match=r"2 pairs of up to 10 tokens \(the longest at pairs.jsonl:\d\).*--batch-size"
    ):
        scan_pairs(tiny_gpt2, PAIRS, batch_size=2)


def test_nothing_trainable(tiny_gpt2) -> None:
    with pytest.raises(NothingTrainableError, match=r"requires_grad"):
        scan_pairs(tiny_gpt2.requires_grad_(False), PAIRS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0.*--batch-size"),
        ({"engine": "fast"}, "engine is 'fast'.*--engine"),
        ({"memory_budget": "lots"}, "memory_budget='lots'"),
    ],
)
def test_settings_that_cannot_be(settings, message, tmp_path) -> None:
    good = {"batch_size": 1, "engine": "hooks", "memory_budget": None}
    check(AuditConfig(model="", data="", out=tmp_path, **good))
    with pytest.raises(InputError, match=message):
        check(AuditConfig(model="", data="", out=tmp_path, **{**good, **settings}))
