"""Whatever goes wrong in gradent is told, once and with a remedy, and the run ends as if nobody had looked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback, attach
from gradent.errors import InputError, ModelError
from gradent.hooks.piggyback import config
from gradent.hooks.reduction import collector, ledger, merge
from gradent.hooks.reduction.account_ledger import AccountLedger
from gradent.kernels.strategy import Product, Strategy, decide
from tests.batches import ragged
from tests.trainer.runs import Gradients, llama, make_trainer, preferences, weights_of
from tests.trainer.test_identity import traces
from tests.truth import assert_exact, truth

STEPS = 6

Fault = Callable[..., Any]


def out_of_order(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("out of order")


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("tried to allocate more than there is")


FAULTS: dict[str, tuple[str, Fault, dict[str, Any]]] = {
    "capture": ("gradent.hooks.capture.capture.Capture._record", out_of_order, {}),
    "capture, before": ("gradent.hooks.capture.capture.Capture._before", out_of_order, {}),
    "a forward's start": ("gradent.hooks.piggyback.forward.WatchedForward.__init__", out_of_order, {}),
    "readout": ("gradent.hooks.piggyback.forward.find_readout", out_of_order, {}),
    "ledger": ("gradent.hooks.reduction.ledger.Ledger.finish", out_of_order, {}),
    "reduction": (
        "gradent.hooks.reduction.ledger.Ledger._slot",
        out_of_memory,
        {"memory_budget": 4096, "attribution": False},
    ),
    "account": ("gradent.hooks.reduction.account_ledger.AccountLedger._slot", out_of_memory, {"memory_budget": 4096}),
    "account's end": ("gradent.attribution.step_accounts.attribute_kept", out_of_order, {}),
    "measuring pass": ("gradent.recorder.recorder.measure", out_of_memory, {"mode": "measure"}),
    "pairing": ("gradent.hooks.piggyback.backward.pair_rows", out_of_order, {}),
    "arming": ("gradent.recorder.recorder.trainable", out_of_order, {}),
    "verdict": ("gradent.recorder.recording.Verdict.from_weights", out_of_order, {}),
    "rows": ("gradent.trainer.callback.journal.to_rows", out_of_order, {"out": "records"}),
    "layers": ("gradent.trainer.records.step.group_layers", out_of_order, {}),
    "scalars": ("gradent.trainer.callback.journal.summarize", out_of_order, {}),
    "window": ("gradent.trainer.callback.journal.to_window", out_of_order, {}),
    "panels": ("gradent.report.live.wandb.Panels.send", out_of_order, {}),
    "realised": ("gradent.trainer.callback.callback.row_logps", out_of_memory, {"realised": True}),
    "probe": (
        "gradent.trainer.callback.probe.measure",
        out_of_memory,
        {"probe_data": preferences(2), "probe_every": 1},
    ),
    "gathering": ("gradent.trainer.callback.callback.gather", out_of_order, {}),
}
# Faults below the trainer's own pass are told by the recorder; after them it measures in its own way, or passes on.
QUIET = {"capture", "capture, before", "a forward's start", "readout", "ledger", "reduction", "account", "pairing"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Room for the run without gradent, which all tests are held to."""
    return {}


def final(tokenizer: PreTrainedTokenizerFast, out: Path, callbacks: list[Any], **arguments: Any) -> Any:
    trainer = make_trainer("dpo", llama(), tokenizer, out, callbacks, max_steps=STEPS, **arguments)
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_of_its_own(
    name: str,
    alone: dict[str, Any],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target, fault, options = FAULTS[name]
    if "out" in options:
        options = {**options, "out": tmp_path / "records"}
    if not alone:
        alone["model"] = final(tiny_tokenizer, tmp_path, [])
    calls = []
    monkeypatch.setattr(target, lambda *args, **kwargs: (calls.append(1), fault(*args, **kwargs)))
    callback = EntanglementCallback(every=1, alert=None, **options)
    with caplog.at_level(logging.WARNING, "gradent"):
        model = final(tiny_tokenizer, tmp_path, [callback])
    assert calls
    theirs, ours = weights_of(alone["model"]), weights_of(model)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert traces(model) == traces(alone["model"])
    said = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert len(said) == len(set(said)), "the same is said twice"
    assert any("out of order" in line or "memory" in line for line in said)
    if name == "account's end":
        assert [record.source for record in callback.records] == ["piggyback"] * STEPS
        assert all(record.attribution is None for record in callback.records) and len(said) == 1
    elif name in QUIET and callback.errors == 0:
        assert all(record.source == "measure" for record in callback.records)
    else:
        assert callback.errors >= 3
        assert "leaves this run alone" in said[-1] and len(said) <= 3
        assert any("EntanglementCallback" in line for line in said[:-1]), "no remedy is told"


def test_an_error_told_by_gradent_itself_needs_no_traceback(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file, where a directory is to be")
    callback = EntanglementCallback(every=1, out=tmp_path / "taken", alert=None, probe_data=preferences(2))
    with caplog.at_level(logging.WARNING, "gradent"):
        final(tiny_tokenizer, tmp_path, [callback])
    (line,) = [line for line in caplog.records if line.name == "gradent"]
    assert "cannot be written" in line.getMessage() and line.exc_info is None
    assert len(callback.records) == STEPS, "what can be measured is measured"


@pytest.mark.parametrize("name", ["window", "measuring pass", "arming", "rows"])
def test_on_error_raise(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, fault, options = FAULTS[name]
    if "out" in options:
        options = {**options, "out": tmp_path / "records"}
    monkeypatch.setattr(target, fault)
    model = llama()
    trainer = make_trainer(
        "dpo", model, tiny_tokenizer, tmp_path, [EntanglementCallback(every=1, on_error="raise", **options)]
    )
    with pytest.raises(RuntimeError, match=r"out of order|allocate"):
        trainer.train()
    assert not any(module._forward_pre_hooks for module in model.modules())  # noqa: SLF001


def test_piggyback_only_and_a_loss_that_does_not_allow_it(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = EntanglementCallback(every=1, mode="piggyback")
    with caplog.at_level(logging.WARNING, "gradent"):
        final(tiny_tokenizer, tmp_path, [callback], ld_alpha=0.5)
    said = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert "Use mode='auto' or 'measure'" in said[0] and "leaves this run alone" in said[-1]
    assert not callback.records


def group_by_group(product: Product, budget: int) -> Strategy:
    """As large products are reduced."""
    return decide(replace(product, has_factors=True, is_complete=False), budget)


def all_rows_at_once(product: Product, budget: int) -> Strategy:
    """As products are reduced of which all rows are here, and whose gradients are not small."""
    return replace(decide(product, budget), reducer="outer") if product.is_complete else group_by_group(product, budget)


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("reduction", ["reduce_group", "reduce_at_once", "account_group"])
def test_memory_that_runs_out_once_costs_nothing(
    failures: int,
    reduction: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reduction is tried again in tiles of half the size, and again; all rows at once go group by group then."""
    module = ledger if reduction == "reduce_at_once" else merge
    true, budgets = getattr(module, reduction), []

    def scarce(*args: Any, **kwargs: Any) -> Any:
        budgets.append(kwargs.get("budget"))
        return out_of_memory() if len(budgets) <= failures else true(*args, **kwargs)

    monkeypatch.setattr(module, reduction, scarce)
    monkeypatch.setattr(collector, "decide", all_rows_at_once if reduction == "reduce_at_once" else group_by_group)
    monkeypatch.setattr(config.RowStore, "reserve", lambda store, size: False)
    model = llama()
    callback = EntanglementCallback(every=1, memory_budget=2**20, alert=None, attribution=reduction == "account_group")
    seen = Gradients(model)
    with caplog.at_level(logging.WARNING, "gradent"):
        make_trainer("dpo", model, tiny_tokenizer, tmp_path, [callback, seen], max_steps=1).train()
    (record,) = callback.records
    assert record.source == "piggyback" and not caplog.records
    assert_exact(record.gram, truth(seen.models[0], record.batch, dtype=torch.float64), record.batch, 1e-5)
    assert len(budgets) > failures
    assert (record.attribution is not None) == (reduction == "account_group")
    if reduction != "reduce_at_once":
        assert budgets[: failures + 1] == [2**20 >> number for number in range(failures + 1)]


@pytest.mark.parametrize("kind", [ledger.Ledger, AccountLedger])
def test_memory_that_stays_out_costs_the_step(
    kind: type[ledger.Ledger],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slot, step = kind._slot, [0]  # noqa: SLF001

    class Steps(Gradients):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step[0] = state.global_step + 1

    def scarce(*args: Any) -> torch.Tensor:
        return out_of_memory() if step[0] == 2 else slot(*args)

    monkeypatch.setattr(kind, "_slot", scarce)
    monkeypatch.setattr(collector, "decide", group_by_group)
    measured: list[int] = []
    monkeypatch.setattr("gradent.recorder.recorder.measure", lambda *args, **kwargs: measured.append(1))
    callback = EntanglementCallback(every=1, alert=None, attribution=kind is AccountLedger)
    with caplog.at_level(logging.WARNING, "gradent"):
        final(tiny_tokenizer, tmp_path, [callback, Steps(llama())])
    assert [record.step for record in callback.records] == [1, 3, 4, 5, 6]
    (said,) = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert "memory ran out" in said and "memory_budget" in said
    assert not measured, "no pass of its own where memory is short"


def test_a_model_without_a_trainable_parameter_is_told(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(*args: Any, **kwargs: Any) -> Any:
        raise InputError("nothing to see")

    monkeypatch.setattr("gradent.trainer.callback.callback.attach", frozen)
    callback = EntanglementCallback(every=1)
    final(tiny_tokenizer, tmp_path, [callback])
    assert callback.errors == 1 and not callback.records


def test_a_training_that_was_broken_off_leaves_no_hooks_to_the_next(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    class Interrupted(Gradients):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if armed:
                raise KeyboardInterrupt

    armed = [True]
    model, callback = llama(), EntanglementCallback(every=1)
    trainer = make_trainer("dpo", model, tiny_tokenizer, tmp_path, [Interrupted(model), callback])
    trainer.callback_handler.callbacks.reverse()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    armed.clear()
    trainer.train()
    assert [record.source for record in callback.records] == ["piggyback"] * 2
    assert not any(module._forward_pre_hooks for module in model.modules())  # noqa: SLF001


def test_a_device_without_float64(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """As Apple's MPS is: here, the CPU stands in for it."""
    monkeypatch.setattr("gradent.model.parameters.WITHOUT_DOUBLE", {"cpu"})
    callback = EntanglementCallback(every=1, realised=True, probe_data=ragged())
    with caplog.at_level(logging.WARNING):
        make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback]).train()
    assert (callback.errors, len(callback.records)) == (0, 0)
    (told,) = (entry.message for entry in caplog.records if entry.name.startswith("gradent"))
    assert "which this device (cpu) does not have" in told
    with pytest.raises(ModelError, match="measures nothing on it"), attach(llama()):
        pass
