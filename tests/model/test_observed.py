"""Passes of gradent's own leave quantized layers as they were, and see what training sees."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gradent import measure
from gradent.errors import ModelError
from gradent.model.observed import observed
from tests.batches import ragged
from tests.quantized import KINDS, dequantized, make_plain, quantize
from tests.truth import TOLERANCE, scaled_error, truth


@pytest.fixture(params=list(KINDS))
def on_quantized(request, tmp_path):
    """LoRA on a base that bitsandbytes quantized."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = get_peft_model(quantize(make_plain(tmp_path / "base"), request.param), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("training", [True, False])
def test_layers_of_bitsandbytes_are_measured_as_they_train(training, on_quantized) -> None:
    model, batch = on_quantized.train(training), ragged()
    true = truth(dequantized(model), batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gram = measure(model, batch)
    assert scaled_error(gram, true) < TOLERANCE["float32"]
    torch.testing.assert_close(gram.chosen_logp, true.chosen_logp, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())


def test_weights_that_a_cpu_has_repacked_are_refused(tmp_path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU repacks no weights")
    model = quantize(make_plain(tmp_path / "base"), "nf4").eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(ModelError, match="repacked"), observed(model):
        pass
