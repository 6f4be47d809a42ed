"""What is no model, no batch or no column of texts is refused by name, with what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradent import (
    PairBatch,
    RowBatch,
    measure,
    measure_rows,
    measure_tokens,
    token_effects,
    token_influence,
)
from gradent.errors import InputError
from tests.batches import ragged
from tests.trainer.runs import llama

FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "measure": measure, "measure_rows": measure_rows, "measure_tokens": measure_tokens, "token_effects": token_effects,
    "token_influence": lambda model, batch: token_influence(model, batch, torch.tensor([1.0, -1.0])),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_batch(name: str) -> None:
    model = llama()
    for batch, kind in (("hello", "str"), (None, "NoneType"), ([("a", "b", "c")], "list"), ({}, "dict")):
        with pytest.raises(InputError, match=rf"{name}: batch is a {kind}; accepted is a (RowBatch|PairBatch)"):
            FUNCTIONS[name](model, batch)
    with pytest.raises(InputError, match=rf"{name}: batch is a LlamaForCausalLM"):
        FUNCTIONS[name](ragged(), model)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_model(name: str) -> None:
    batch: Any = ragged()
    if name == "token_influence":
        batch = RowBatch.from_tokens([([1, 2], [[3], [4]])])
    for model, kind in (("my-model", "str"), (None, "NoneType"), (batch, type(batch).__name__)):
        with pytest.raises(InputError, match=rf"model is a {kind}; accepted is a torch.nn.Module"):
            FUNCTIONS[name](model, batch)


def test_a_batch_of_pairs_is_told_what_pairs_are_for() -> None:
    with pytest.raises(InputError, match=r"measure: batch is a RowBatch; accepted is a PairBatch"):
        measure(llama(), RowBatch.from_tokens([([1, 2], [[3], [4]])]))


@pytest.mark.parametrize("name", ["prompts", "chosen", "rejected"])
@pytest.mark.parametrize("column", ["a", b"a", 3, None])
def test_a_text_is_no_list_of_texts(name: str, column: Any, tiny_tokenizer: Any) -> None:
    columns: dict[str, Any] = {"prompts": ["a"], "chosen": ["b"], "rejected": ["d"], name: column}
    with pytest.raises(
        InputError, match=rf"PairBatch.from_text: {name} is a {type(column).__name__}; accepted is a seq"
    ):
        PairBatch.from_text(tiny_tokenizer, **columns)


@pytest.mark.parametrize(
    ("prompts", "completions", "named"),
    [
        ("a", [["b"]], "prompts"),
        (["a"], "b", "completions"),
        (["a"], ["b"], r"completions\[0\]"),
        (["a"], [3], r"\[0\]"),
    ],
)
def test_a_text_is_no_list_of_completions(prompts: Any, completions: Any, named: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(InputError, match=rf"RowBatch.from_text: .*{named} is a .*accepted is a sequence"):
        RowBatch.from_text(tiny_tokenizer, prompts, completions)
