"""What is seen of a model without weights is what a measurement of the model with weights meets."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gradent.errors import ModelError
from gradent.hooks.passes import driver
from gradent.hooks.reduction import collector, ledger
from gradent.hooks.uses.formats import Factored, LazyFactored, SparseRows
from gradent.kernels.strategy import decide
from gradent.loading.source import resolve_source
from gradent.measurement import measure
from gradent.pairs.batch import PairBatch
from gradent.planning.trace import inspect_model
from tests.adapters import ADAPTERS, adapt
from tests.auditing.made import save_lora
from tests.zoo import build

TOKENS = 7
# A prompt of one token: with a longer one, the head would meet fewer rows than the plan, which knows no prompt, counts.
PAIR = PairBatch.from_tokens([([3], [17, 4, 11, 5, 30, 8], [17, 4, 11, 6, 1, 9])])

Seen = dict[str, dict[str, float]]


def meets(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Parameter -> kind of form -> rows of the chosen response's factors, as a real measurement hands them over."""
    found: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    add, add_rows = ledger.Ledger.add, ledger.Ledger.add_rows

    def watched(self: Any, param: int, row: int, slot: Any, form: Any) -> None:
        if row == 0:
            form_ = form.make() if isinstance(form, LazyFactored) else form
            if isinstance(form_, Factored):
                found[param]["matrix"] += len(form_.u)
            elif isinstance(form_, SparseRows):
                found[param]["lookup"] += len(form_.ids)
            else:
                found[param]["explicit"] = 0
        add(self, param, row, slot, form)

    def formed(self: Any, param: int, rows: Any, slot: Any, grads: Any) -> None:
        if 0 in rows:
            found[param]["explicit"] = 0
        add_rows(self, param, rows, slot, grads)

    measure(model, PAIR)  # the first one also finds out whether rows may share a forward
    monkeypatch.setattr(driver, "plain_rows", lambda *given: 0)  # it meets no rule
    monkeypatch.setattr(ledger.Ledger, "add", watched)
    monkeypatch.setattr(ledger.Ledger, "add_rows", formed)
    kept = {"has_factors": True, "is_complete": False}  # small products would be formed as they arrive
    monkeypatch.setattr(collector, "decide", lambda product, budget: decide(replace(product, **kept), budget))
    measure(model, PAIR)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {names[number]: dict(kinds) for number, kinds in found.items()}


def planned(model: Path, adapter: Path | None = None) -> Seen:
    """The same of the shell."""
    found: Seen = defaultdict(dict)
    for use in inspect_model(resolve_source(str(model), adapter and str(adapter))).uses:
        kind = "explicit" if use.kind == "sum" else use.kind
        if kind != "unused":
            found[use.parameter][kind] = 0 if kind == "explicit" else use.density * TOKENS
    return dict(found)


# Every form, ties, positions, fused experts, parameters without a rule.
@pytest.mark.parametrize("family", ["gpt2", "gpt2, untied", "llama", "llama, biases, tied", "opt", "mixtral", "mamba"])
def test_every_parameter_is_seen_as_it_is_measured(family, tmp_path, monkeypatch) -> None:
    model = build(family, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    seen = meets(model, monkeypatch)
    found = planned(tmp_path)
    # A tied head's gradient is reduced ahead, and comes back as rows of the lookup.
    for name, kinds in found.items():
        for kind, rows in kinds.items():
            assert kind in seen[name]
            # An expert's tokens that no gradient reaches (a row's last ones) are left out.
            is_expert = "experts" in name and rows - 2 <= seen[name][kind] <= rows
            assert kind == "lookup" or is_expert or seen[name][kind] == rows
    assert found.keys() == seen.keys()


@pytest.mark.parametrize("name", ["LoRA on Conv1D", "DoRA", "saved head", "LoRA, every bias", "IA3", "new tokens"])
def test_adapters(name, tmp_path, monkeypatch) -> None:
    base, config = ADAPTERS[name]
    build(base, dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = adapt(build(base, dtype=torch.float32), config())
    model.save_pretrained(tmp_path / "adapter")
    assert planned(tmp_path / "base", tmp_path / "adapter") == meets(model, monkeypatch)


def test_every_number_is_counted(local_model) -> None:
    shell = inspect_model(resolve_source(str(local_model)))
    real = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(local_model).parameters())
    assert shell.parameters == shell.trainable == sum(use.elements for use in shell.uses) == real
    assert shell.dtype == torch.float32


def test_the_global_state_stays(local_model, tmp_path) -> None:
    save_lora(tmp_path / "adapter", local_model)
    before = torch.random.get_rng_state()
    shell = inspect_model(resolve_source(str(tmp_path / "adapter")))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.empty(1).device.type == "cpu" and type(torch.empty(1)) is torch.Tensor
    assert shell.trainable < shell.parameters
    assert {use.kind for use in shell.uses} == {"matrix"}


def test_a_model_that_asks_for_values_is_refused(tmp_path) -> None:
    build("xlm", dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="without its weights"):
        inspect_model(resolve_source(str(tmp_path)))
