"""`attach` in a loop written by hand: what each harvest holds, and that the loop is left alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradent import GradentError, PairBatch, attach, measure
from gradent.errors import InputError, ModelError
from gradent.recorder import Recording, join_recordings
from tests.adapters import build_adapted, lora_everywhere
from tests.attribution.brute_force import Frozen
from tests.batches import left_padded, ragged, square
from tests.trainer_steps import dpo, through_logits
from tests.truth import TOLERANCE, assert_exact, scaled_error, truth, untouched
from tests.zoo import build


def weights(true: object, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """`d_w`, `d_l` of a loss that is a mean, by autograd of the loss alone."""
    chosen, rejected = (part.clone().requires_grad_() for part in (true.chosen_logp, true.rejected_logp))
    by_chosen, by_rejected = torch.autograd.grad(loss(chosen, rejected) * len(chosen), (chosen, rejected))
    return -by_chosen, by_rejected


def check(found: Recording | None, model: nn.Module, batch: PairBatch, source: str = "piggyback") -> None:
    assert found is not None and found.source == source and found.inactive == found.unpaired == 0
    true = truth(model, batch)
    assert_exact(found.gram, true, batch)
    d_w, d_l = weights(true, dpo)
    torch.testing.assert_close(found.verdict.d_w, d_w, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.verdict.d_l, d_l, rtol=1e-5, atol=0)
    assert found.batch is not None
    for row in range(2 * len(batch)):
        ids, marks = found.batch.row(row)
        want_ids, want_marks = batch.row(row)
        assert torch.equal(ids, want_ids) and torch.equal(marks.bool(), want_marks.bool())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("mode", ["auto", "piggyback", "measure"])
def test_a_loop_written_by_hand(mode: str, lora: bool) -> None:
    model = lora_everywhere("llama") if lora else build("llama")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batches = [ragged(), left_padded(ragged(2)), square()]
    with attach(model, mode=mode) as recorder:
        for batch in batches:
            before = copy.deepcopy(model)
            through_logits(model, batch).backward()
            found = recorder.harvest()
            check(found, before, batch, "measure" if mode == "measure" else "piggyback")
            assert found.overhead_s > 0
            optimizer.step()
            optimizer.zero_grad()
    assert not recorder.armed


def test_the_loop_is_left_alone() -> None:
    def finals(watch: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = build("llama", dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        recorder = attach(model)
        for batch in (ragged(), square(), ragged(2)):
            if watch:
                recorder.arm()
            through_logits(model, batch).backward()
            if watch:
                assert recorder.harvest() is not None
                recorder.disarm()
            optimizer.step()
            optimizer.zero_grad()
        return [*model.parameters(), torch.rand(2)]

    assert all(torch.equal(one, other) for one, other in zip(finals(True), finals(False), strict=True))


def test_micro_batches_are_joined_and_scaled() -> None:
    model, parts = build("gpt2"), [ragged(2), square()]
    with attach(model, by_module=True) as recorder:
        for count, part in enumerate(parts, start=1):
            (through_logits(model, part) / 2).backward()
            assert recorder.collect() == count
        found = recorder.harvest(scale=2.0)
    assert found is not None and len(found.gram) == 6
    for pairs, part in ((range(2), parts[0]), (range(2, 6), parts[1])):
        true = truth(model, part)
        assert_exact(found.gram.select(pairs), true, part)
        d_w, d_l = weights(true, dpo)
        torch.testing.assert_close(found.verdict.d_w[list(pairs)], d_w)
        torch.testing.assert_close(found.verdict.d_l[list(pairs)], d_l)


def test_nothing_to_harvest() -> None:
    model = build("gpt2")
    with attach(model) as recorder:
        assert recorder.harvest() is None
        through_logits(model, ragged())  # no backward
        assert recorder.harvest() is None
        through_logits(model, ragged()).backward()
        assert recorder.harvest() is not None
        assert recorder.harvest() is None
    with pytest.raises(InputError, match="not armed"):
        recorder.harvest()


@pytest.mark.parametrize("leave", [False, True], ids=["to the end", "by an exception"])
def test_nothing_is_left_behind(leave: bool) -> None:
    model, batch = build("llama"), ragged()

    def block() -> None:
        with attach(model) as recorder:
            torch.autograd.grad(through_logits(model, batch), list(model.parameters()))
            if leave:
                raise ZeroDivisionError
            assert recorder.harvest() is not None

    with untouched(model):
        try:
            block()
        except ZeroDivisionError:
            assert leave


def test_a_measurement_inside_the_block_is_not_taken_for_a_step() -> None:
    model, batch = build("gpt2"), ragged()
    with attach(model) as recorder:
        measure(model, square())
        assert recorder.harvest() is None
        through_logits(model, batch).backward()
        measure(model, square())
        check(recorder.harvest(), model, batch)


def test_passes_of_the_reference_are_not_taken_for_a_step() -> None:
    model, reference, batch = build("gpt2"), build("gpt2", seed=1), ragged()
    with attach(model) as recorder:
        with torch.no_grad():
            through_logits(model, square())
        loss = through_logits(model, batch)
        (loss + 0.0 * through_logits(reference, batch)).backward()
        check(recorder.harvest(), model, batch)


def test_modules() -> None:
    model, batch = build("llama"), ragged()
    with attach(model, by_module=True) as recorder:
        through_logits(model, batch).backward()
        found = recorder.harvest()
    assert found is not None and found.gram.modules
    assert_exact(found.gram, truth(model, batch), batch)
    with attach(model) as recorder:
        through_logits(model, batch).backward()
        assert recorder.harvest().gram.modules is None


def test_metric_is_that_of_the_step_at_which_it_was_armed() -> None:
    model, batch = build("gpt2"), ragged()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(InputError, match="exp_avg_sq"), attach(model, metric=optimizer):
        pass
    through_logits(model, square()).backward()
    optimizer.step()
    optimizer.zero_grad()
    want = measure(model, batch, metric=optimizer, engine="func")
    for mode in ("piggyback", "measure"):
        with attach(model, metric=optimizer, mode=mode) as recorder:
            through_logits(model, batch).backward()
            found = recorder.harvest()
        for name in ("chosen_sq", "rejected_sq", "inner"):
            torch.testing.assert_close(getattr(found.gram, name), getattr(want, name), rtol=1e-8, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_account_is_of_the_optimizer_as_it_is_at_each_step(momentum: float) -> None:
    """One block around all steps: a first step has no momentum yet, the others have."""
    model, batch = build("llama"), ragged(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=momentum)
    with attach(model, optimizer=optimizer) as recorder:
        for step in range(3):
            frozen = Frozen(model, optimizer, build("llama"))
            through_logits(model, batch).backward()
            found = recorder.harvest()
            assert found is not None
            assert found.attribution is not None
            want = frozen.account(batch, dpo, 1.0)[1]
            scale = float(torch.stack(list(want.values())).abs().max())
            for source, values in found.attribution.moved.items():
                torch.testing.assert_close(values, want[source], rtol=0, atol=1e-5 * scale)
            assert bool(found.attribution.moved["momentum"].any()) == (step > 0 and momentum > 0)
            optimizer.step()
            optimizer.zero_grad()


def test_adam_is_accounted_for_from_its_second_step_on(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accounts = []
    with attach(model, optimizer=optimizer) as recorder, caplog.at_level(logging.WARNING, "gradent"):
        for _ in range(3):
            through_logits(model, ragged(3)).backward()
            found = recorder.harvest()
            assert found is not None
            accounts.append(found.attribution)
            optimizer.step()
            optimizer.zero_grad()
    assert [account is None for account in accounts] == [True, False, False]
    assert not caplog.records, "a first step is nothing to complain of"


def test_one_response_on_both_sides_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = build("gpt2")
    kept = PairBatch.from_tokens([([5, 6], [7, 8, 9], [10, 4, 11])])
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = SimpleNamespace(**{name: getattr(kept, name)[[0, 0, 0, 1]] for name in names})  # PairBatch refuses it
    true = truth(model, kept)
    with caplog.at_level(logging.WARNING, "gradent"), attach(model, pairing="halves") as recorder:
        for _ in range(2):
            through_logits(model, batch).backward()
            found = recorder.harvest()
            assert found is not None and found.inactive == 1
            assert_exact(found.gram, true, kept)
            assert len(found.batch) == 1
    (said,) = [line for line in caplog.records if line.name == "gradent"]
    assert "chosen equals rejected" in said.getMessage()


def test_weights_of_active_pairs_are_those_of_the_whole_batch() -> None:
    """A mean over three pairs of which one is active: its weight is 1, not 1/3."""
    model, batch = build("gpt2"), ragged()
    true = truth(model, batch)
    margin = true.chosen_logp - true.rejected_logp
    limit = float(margin.sort().values[1]) - 1e-3
    with attach(model) as recorder:
        through_logits(model, batch, lambda w, y: F.relu(limit - (w - y)).mean()).backward()
        found = recorder.harvest()
    assert found is not None and found.inactive == 2
    torch.testing.assert_close(found.verdict.d_w, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(found.verdict.d_l, torch.ones(1, dtype=torch.float64))


def prompt_weighed(model: nn.Module, batch: PairBatch) -> Tensor:
    """As ORPO: a likelihood of prompt and chosen response, beside a loss of the completions' means."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    marks = batch.completion_mask[:, 1:]
    chosen, rejected = ((logps * marks).sum(1) / marks.sum(1)).chunk(2)
    whole = (logps * batch.attention_mask[:, 1:])[: len(batch)].sum() / batch.attention_mask[: len(batch), 1:].sum()
    return dpo(chosen, rejected, beta=1.0) - whole


@pytest.mark.parametrize("padded", [False, True], ids=["right", "left"])
def test_a_likelihood_of_the_prompt_too(padded: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build("llama"), ragged()
    given = left_padded(batch) if padded else batch
    with caplog.at_level(logging.WARNING, "gradent"), attach(model) as recorder:
        for _ in range(2):
            prompt_weighed(model, given).backward()
            found = recorder.harvest()
    assert found is not None and found.source == "measure" and len(caplog.records) == 1
    assert_exact(found.gram, truth(model, batch), batch)
    for row in range(6):
        assert torch.equal(found.batch.row(row)[1].bool(), batch.row(row)[1].bool())
    with attach(model, mode="piggyback") as recorder:
        prompt_weighed(model, batch).backward()
        with pytest.raises(ModelError, match="weighs the tokens"):
            recorder.harvest()


def test_an_output_that_nothing_can_be_read_off_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Hidden(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"scores": self.model(input_ids=input_ids).logits}

    model, batch = Hidden(build("gpt2")), ragged()
    with caplog.at_level(logging.WARNING, "gradent"), attach(model) as recorder:
        for _ in range(2):
            model(batch.input_ids)["scores"].square().mean().backward()
            assert recorder.harvest() is None
    (said,) = [line for line in caplog.records if line.name == "gradent"]
    assert "neither log_probs nor logits" in said.getMessage()


@pytest.mark.parametrize("wrapped", [False, True], ids=["as model", "as compiled"])
def test_compiled_models_are_measured(wrapped: bool) -> None:
    model, batch = build("gpt2"), ragged()
    compiled = torch.compile(model, backend="eager")
    recorder = attach(model, compiled=compiled) if wrapped else attach(compiled, mode="measure")
    with recorder:
        through_logits(compiled, batch).backward()
        check(recorder.harvest(), model, batch, "measure")


@pytest.mark.parametrize("options", [{"mode": "fast"}, {"pairing": "pairs"}, {"memory_budget": "much"}])
def test_arguments_outside_of_what_is_accepted(options: dict[str, str]) -> None:
    with pytest.raises(GradentError, match=next(iter(options))):
        attach(build("gpt2"), **options)


def test_a_frozen_model() -> None:
    model = build("gpt2").requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameter"), attach(model):
        pass


def test_half_a_step_is_not_joined_to_the_next() -> None:
    model, batch = build("llama"), ragged()
    with attach(model, mode="piggyback") as recorder:
        through_logits(model, square()).backward()
        recorder.collect()
        prompt_weighed(model, batch).backward()
        with pytest.raises(ModelError, match="weighs the tokens"):
            recorder.harvest()
        through_logits(model, batch).backward()
        found = recorder.harvest()
    check(found, model, batch)


def test_half_a_step_leaves_the_next_its_account() -> None:
    model, batch = build("llama"), ragged()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with attach(model, mode="piggyback", optimizer=optimizer) as recorder:
        prompt_weighed(model, batch).backward()
        with pytest.raises(ModelError, match="weighs the tokens"):
            recorder.harvest()
        optimizer.step()
        optimizer.zero_grad()
        through_logits(model, batch).backward()
        found = recorder.harvest()
    assert found is not None and found.attribution is not None


def test_joined_recordings() -> None:
    model, parts = build("gpt2"), [ragged(1), ragged(2)]
    found = []
    for part in parts:
        with attach(model) as recorder:
            through_logits(model, part).backward()
            found.append(recorder.harvest())
    joined = join_recordings(found, scale=3.0)
    assert len(joined.gram) == len(joined.batch) == 3 and joined.source == "piggyback"
    assert joined.verdict.d_w.tolist() == [3 * x for one in found for x in one.verdict.d_w.tolist()]
    assert joined.overhead_s == sum(one.overhead_s for one in found)


def test_the_check_can_fail() -> None:
    model, batch = build("gpt2"), ragged()
    with attach(model) as recorder:
        through_logits(model, batch, lambda chosen, rejected: dpo(rejected, chosen)).backward()
        found = recorder.harvest()
    with pytest.raises(AssertionError):
        check(found, model, batch)
    assert max(TOLERANCE.values()) < 1e-2


@pytest.mark.parametrize(
    ("name", "source"),
    [("prompt tuning", "measure"), ("LoRA on fused experts", "piggyback"), ("new tokens", "measure")],
)
def test_adapters_that_cannot_be_read_off_are_measured(name: str, source: str) -> None:
    batch, model = ragged(), build_adapted(name)
    true = truth(model, batch)
    with attach(model) as recorder:
        through_logits(model, batch).backward()
        found = recorder.harvest()
    assert found is not None
    assert found.source == source
    assert scaled_error(found.gram, true) <= TOLERANCE[true.arithmetic]
