"""`measure` is exact on every causal-LM family of transformers: all parameters and LoRA, both engines, both padded.

Each day this is shown for one family of every fingerprint (tests/zoo_prints.py), and for all of them that the
fingerprint is still the committed one; `make test-all` shows it for each family.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from gradent.errors import NotCausalError
from gradent.measurement import measure, sequence_logps
from tests.adapters import lora_everywhere
from tests.batches import left_padded, ragged
from tests.truth import TOLERANCE, Truth, assert_exact, call, logp_error, scaled_error, truth, untouched
from tests.zoo import FAMILIES, MEASURABLE, build, model_class, tiny_config
from tests.zoo_prints import RENEW, committed, facts, fingerprint, print_of, zoo
from tests.zoo_tables import FLOAT32_ONLY, LORA_EXCLUDES, OVERRIDES, TWINS, UNBUILT, VARIANTS

MIXTURES = ("deepseek_v3", "gpt_oss", "jamba", "mixtral", "olmoe", "qwen3_moe")


@pytest.fixture(scope="module", params=zoo())
def name(request: pytest.FixtureRequest) -> str:
    """A family or variant. The scope keeps the tests of a family together, so that its truth is computed once."""
    return request.param


@pytest.fixture(scope="module")
def true(name: str) -> Truth:
    return truth(build(name), ragged())


def is_causal(model: PreTrainedModel) -> bool:
    """Whether another last token leaves the logits before it alone."""
    ids = torch.tensor([[5, 17, 42, 8, 61, 9, 33, 70]])
    changed = ids.clone()
    changed[0, -1] = 24
    with torch.no_grad():
        moved = (call(model, ids) - call(model, changed))[0, :-1].abs().max()
    return moved.item() < 1e-6


def skip_twin(name: str) -> None:
    if name in TWINS:
        pytest.skip(f"the same model as {TWINS[name]}")


@pytest.mark.parametrize("family", MEASURABLE)
def test_the_fingerprint_is_the_committed_one(family):
    found, known = facts(build(family)), print_of().get(family)
    assert known is not None, f"{family} is new: {RENEW}"
    was = committed()[known]["facts"]
    assert fingerprint(found) == known, f"{family}: gone {set(was) - set(found)}, new {set(found) - set(was)}. {RENEW}"


def test_the_committed_fingerprints_are_those_of_the_zoo():
    assert sorted(print_of()) == list(MEASURABLE)
    assert all(fingerprint(group["facts"]) == key for key, group in committed().items())


def test_a_fingerprint_heeds_calls_and_not_sizes():
    def of(**fields: object) -> str:
        return fingerprint(facts(model_class("llama")(tiny_config("llama", fields)).eval().double()))

    assert of() == print_of()["llama"]
    assert of(num_hidden_layers=3, hidden_size=64, vocab_size=101, num_key_value_heads=1) == of()
    for other in ({"attention_bias": True}, {"tie_word_embeddings": True}):
        assert of(**other) != of()
    narrow, stray, shuffled = build("llama").float(), build("llama"), build("llama")
    stray.model.norm.register_forward_hook(lambda module, args, out: out + module.weight.cosh())
    shuffled.lm_head.register_forward_pre_hook(lambda module, args: args[0][:, torch.arange(args[0].shape[1])])
    assert len({fingerprint(facts(model)) for model in (build("llama"), narrow, stray, shuffled)}) == 4


def test_the_zoo_is_causal_and_alive(name, true):
    assert is_causal(build(name))
    assert all((entry > 0).all() for entry in (true.chosen_sq, true.rejected_sq))
    assert true.inner.abs().min() > 0


def test_every_parameter(name, true):
    model = build(name)
    call(model, ragged().input_ids[:1])  # some classes settle their own modules in their first forward
    with untouched(model):
        gram = measure(model, ragged(), by_module=True)
    assert_exact(gram, true, ragged())


def test_log_probs_alone(name, true):
    chosen, rejected = sequence_logps(build(name), left_padded(ragged()))
    assert logp_error(replace(true, chosen_logp=chosen, rejected_logp=rejected), true) <= TOLERANCE[true.arithmetic]


def test_second_engine(name, true):
    skip_twin(name)
    model = build(name)
    assert_exact(measure(model, ragged(), engine="func", by_module=True), true, ragged())


def test_float32(name, true):
    skip_twin(name)
    model = build(name, dtype=torch.float32)
    plain = truth(model, ragged())
    gram = measure(model, ragged())
    assert_exact(gram, plain, ragged())
    # Against float64, what float32 itself costs comes on top: up to 2e-5 where the model is badly conditioned.
    if true.arithmetic != "float32":
        assert scaled_error(gram, true) <= TOLERANCE["float32"] + scaled_error(plain, true)


def test_lora_on_every_linear_layer(name):
    skip_twin(name)
    batch, model = left_padded(ragged().select([1, 2])), lora_everywhere(name)
    true = truth(model, batch)
    with untouched(model):
        gram = measure(model, batch, by_module=True)
    assert_exact(gram, true, batch)


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_other_implementations_of_experts(mixture, experts):
    model = build(mixture, dtype=torch.float32, experts=experts)
    plain = truth(build(mixture, dtype=torch.float32), ragged())
    assert_exact(measure(model, ragged(), by_module=True), plain, ragged())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mamba", "mixtral", "opt", "glm", "qwen3_next"])
def test_bfloat16(family):
    model = build(family, dtype=torch.bfloat16)
    assert_exact(measure(model, ragged(), by_module=True), truth(model, ragged()), ragged())


def test_another_implementation_of_experts_on_the_same_model():
    model = build("mixtral", dtype=torch.float32, experts="batched_mm")
    plain = truth(build("mixtral", dtype=torch.float32), ragged())
    for experts in ("batched_mm", "eager", "grouped_mm"):
        model.set_experts_implementation(experts)
        assert_exact(measure(model, ragged()), plain, ragged())


@pytest.mark.parametrize("family", sorted(UNBUILT))
def test_what_cannot_be_measured_still_cannot(family):
    says, _ = UNBUILT[family]
    if says == "not causal":
        model = build(family)
        assert not is_causal(model)
        with pytest.raises(NotCausalError):
            measure(model, ragged())
    else:
        with pytest.raises((ImportError, ValueError, RuntimeError, AssertionError), match=says):
            truth(build(family), ragged())


@pytest.mark.parametrize("family", sorted(FLOAT32_ONLY))
def test_what_runs_in_float32_only_still_does(family):
    says, _ = FLOAT32_ONLY[family]
    with pytest.raises(RuntimeError, match=says):
        truth(build(family, dtype=torch.float64), ragged())


def test_twins_are_alike():
    for name, other in TWINS.items():
        shapes = [{key: value.shape for key, value in build(which).named_parameters()} for which in (name, other)]
        assert shapes[0] == shapes[1], name


def test_the_tables_name_families_that_exist():
    named = {*OVERRIDES, *UNBUILT, *FLOAT32_ONLY, *LORA_EXCLUDES, *TWINS, *(family for family, _ in VARIANTS.values())}
    assert named <= set(FAMILIES)
