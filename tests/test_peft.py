"""`measure` is exact under PEFT's adapters, and where only a part of a model trains."""

from __future__ import annotations

import pytest
import torch

from gradent.measurement import measure
from tests.adapters import ADAPTERS, build_adapted
from tests.batches import left_padded, ragged
from tests.truth import assert_exact, truth, untouched
from tests.zoo import build


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_adapter(name, padding):
    batch = ragged() if padding == "right" else left_padded(ragged())
    true = truth(build_adapted(name), batch)
    assert not true.dead
    with untouched(build_adapted(name)) as model:
        gram = measure(model, batch, by_module=True)
    assert_exact(gram, true, batch)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_by_the_second_engine(name):
    batch, model = ragged(), build_adapted(name)
    true = truth(model, batch)
    with untouched(model):
        gram = measure(model, batch, engine="func", by_module=True)
    assert_exact(gram, true, batch)


@pytest.mark.parametrize("name", ["LoRA on Conv1D", "DoRA", "LoRA on embeddings", "saved head", "IA3", "prefix tuning"])
def test_adapter_in_float32(name):
    batch, model = ragged(), build_adapted(name, torch.float32)
    assert_exact(measure(model, batch, by_module=True), truth(model, batch), batch)


def test_two_adapters_of_which_one_is_active():
    batch, model = ragged(), build_adapted("rsLoRA")
    model.add_adapter("other", ADAPTERS["rsLoRA"][1](), autocast_adapter_dtype=False)
    model.to(torch.float64).set_adapter("other")
    assert_exact(measure(model, batch, by_module=True), truth(model, batch), batch)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, biases, tied", "mixtral", "mamba"])
@pytest.mark.parametrize("part", ["one layer", "norms", "embeddings", "all but embeddings", "every second parameter"])
def test_partly_frozen(name, part):
    model, batch = build(name), ragged()
    for number, (parameter_name, parameter) in enumerate(model.named_parameters()):
        embedding = parameter is model.get_input_embeddings().weight
        parameter.requires_grad_(
            {
                "one layer": ".1." in parameter_name,
                "norms": "norm" in parameter_name or ".ln_" in parameter_name,
                "embeddings": embedding,
                "all but embeddings": not embedding,
                "every second parameter": number % 2 == 0,
            }[part]
        )
    assert_exact(measure(model, batch, by_module=True), truth(model, batch), batch)
