"""Which steps are measured, and what a record holds under accumulation, short batches, evaluation and resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback, GradentError
from gradent.record.stream import read_stream
from tests.trainer.runs import Gradients, data_for, gradient_error, llama, make_trainer, weights_of, with_lora
from tests.truth import assert_exact, truth

CHECKPOINTING = {
    "kept": {},
    "recomputed": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def exact(callback: EntanglementCallback, seen: Gradients) -> None:
    for record in callback.records:
        want = truth(seen.models[record.step - 1], record.batch, dtype=torch.float64)
        assert_exact(record.gram, want, record.batch, 1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_accumulated_batches_make_one_record(
    checkpointing: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = with_lora(llama()) if lora else llama()
    callback, seen = EntanglementCallback(every=1), Gradients(model)
    make_trainer(
        "dpo", model, tiny_tokenizer, tmp_path, [callback, seen], gradient_accumulation_steps=2,
        per_device_train_batch_size=2, **CHECKPOINTING[checkpointing],
    ).train()  # fmt: skip
    assert [len(record.gram) for record in callback.records] == [4, 4]
    assert {record.source for record in callback.records} == {"piggyback"}
    exact(callback, seen)
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert gradient_error(record, before, grads, 4) < 1e-5


@pytest.mark.parametrize("mode", ["piggyback", "measure"])
@pytest.mark.parametrize(
    ("rows", "size", "accumulation", "steps"),
    [(7, 4, 1, [[4], [3]]), (7, 2, 2, [[2, 2], [2, 1]]), (5, 2, 2, [[2, 2], [1]]), (3, 1, 2, [[1, 1], [1]])],
)
def test_last_short_batch(
    rows: int,
    size: int,
    accumulation: int,
    steps: list[list[int]],
    mode: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """A step's gradient is the mean over its micro-batches of means over their pairs."""
    model = llama()
    callback, seen = EntanglementCallback(every=1, mode=mode), Gradients(model)
    make_trainer(
        "dpo", model, tiny_tokenizer, tmp_path, [callback, seen], data=data_for("dpo", rows), max_steps=-1,
        num_train_epochs=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
    ).train()  # fmt: skip
    assert [len(record.gram) for record in callback.records] == [sum(sizes) for sizes in steps]
    exact(callback, seen)
    for record, before, grads, sizes in zip(callback.records, seen.models, seen.grads, steps, strict=False):
        pairs = torch.cat([torch.full((count,), float(count * len(sizes))) for count in sizes])
        assert gradient_error(record, before, grads, pairs) < 1e-5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_scaler_is_divided_out(
    accumulation: int, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = llama()
    callback, seen = EntanglementCallback(every=1), Gradients(model)
    trainer = make_trainer(
        "dpo", model, tiny_tokenizer, tmp_path, [callback, seen], gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation,
    )  # fmt: skip
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)  # as accelerate has it under fp16
    trainer.train()
    exact(callback, seen)
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert gradient_error(record, before, {name: grad / 4096 for name, grad in grads.items()}, 4) < 1e-5
        assert record.attribution is None, "gradients keep the loss scale until the step"


def test_a_gradient_scaler_is_divided_out_of_the_account(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def clip(parameters: Any, most: float, *args: Any) -> torch.Tensor:
        trainer.accelerator.scaler.unscale_(trainer.optimizer.optimizer)  # as accelerate does under fp16
        return torch.nn.utils.clip_grad_norm_(parameters, most)

    callback = EntanglementCallback(every=1, realised=True)
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback], learning_rate=1e-4, max_grad_norm=0.5)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    trainer.accelerator.clip_grad_norm_ = clip
    trainer.train()
    assert len(callback.records) == 2
    for record in callback.records:
        assert record.attribution is not None and record.attribution.explained > 0.99


def test_bf16(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = llama()
    callback, seen = EntanglementCallback(every=1), Gradients(model)
    make_trainer("dpo", model, tiny_tokenizer, tmp_path, [callback, seen], bf16=True).train()
    for record, before in zip(callback.records, seen.models, strict=False):
        assert record.source == "piggyback"
        with torch.autocast("cpu", torch.bfloat16):
            want = truth(before, record.batch)
        assert_exact(record.gram, want, record.batch, 2e-2)


@pytest.mark.parametrize(("every", "measured"), [(1, [1, 2, 3, 4, 5]), (2, [1, 2, 4]), (3, [1, 3]), (9, [1])])
@pytest.mark.parametrize("epochs", [False, True], ids=["max_steps", "epochs"])
def test_the_first_step_and_every_kth(
    every: int, measured: list[int], epochs: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    callback = EntanglementCallback(every=every)
    length = {"max_steps": -1, "num_train_epochs": 2.5} if epochs else {"max_steps": 5}
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback], **length)
    trainer.train()
    assert [record.step for record in callback.records] == measured
    logged = [logs["step"] for logs in trainer.state.log_history if "gradent/cosine" in logs]
    assert logged == measured


def test_evaluation_in_mid_run(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def run(callbacks: list[Any]) -> Any:
        trainer = make_trainer(
            "dpo", llama(), tiny_tokenizer, tmp_path, callbacks, eval_strategy="steps", eval_steps=1, max_steps=3,
            per_device_eval_batch_size=2, eval_on_start=True, options={"eval_dataset": data_for("dpo", 3)},
        )  # fmt: skip
        trainer.train()
        return trainer

    model = llama()
    callback, seen = EntanglementCallback(every=1), Gradients(model)
    trainer, alone = run([callback, seen]), run([])
    assert [record.step for record in callback.records] == [1, 2, 3]
    exact(callback, seen)
    evaluations = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    assert len(evaluations) == 4
    assert not any(key.startswith("gradent") for logs in evaluations for key in logs)
    assert [logs["eval_loss"] for logs in evaluations] == [
        logs["eval_loss"] for logs in alone.state.log_history if "eval_loss" in logs
    ]
    ours, theirs = weights_of(trainer.model), weights_of(alone.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_resumes(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def run(folder: str, resume: bool | str = False, **arguments: Any) -> tuple[Any, EntanglementCallback]:
        callback = EntanglementCallback(every=1, out=tmp_path / folder / "records")
        trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path / folder, [callback], **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    whole, uninterrupted = run("whole", max_steps=4)
    # A run that is lost at step 3, with a checkpoint of step 2.
    run("parts", max_steps=3, save_strategy="steps", save_steps=2)
    resumed, callback = run("parts", str(tmp_path / "parts" / "checkpoint-2"), max_steps=4)
    assert [record.step for record in callback.records] == [3, 4]
    ours, theirs = weights_of(resumed.model), weights_of(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    streams = [read_stream(tmp_path / folder / "records" / "pairs.jsonl") for folder in ("whole", "parts")]
    assert streams[0]["step"] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert streams[0]["pair"] == [0, 1, 2, 3] * 4
    assert streams[0] == streams[1]
    inner = torch.cat([record.gram.inner for record in uninterrupted.records])
    assert streams[0]["inner"] == inner.tolist()
    assert streams[0]["case"] == torch.cat([record.verdict.case for record in uninterrupted.records]).tolist()
    lines = (tmp_path / "parts" / "records" / "pairs.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 12 + 8  # step 3 is there twice


def test_two_trainings_with_one_callback(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    callback = EntanglementCallback(every=1)
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback])
    trainer.train()
    trainer.train()
    assert [record.step for record in callback.records] == [1, 2, 1, 2]


def test_metric_of_adam(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Entries are `Σ a_k b_k / (√v̂_k + ε)` with the second moments before the step: none before the first."""
    model = llama()
    roots: list[dict[str, torch.Tensor]] = []

    class Moments(Gradients):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer, named = kwargs["optimizer"], kwargs["model"].named_parameters()
            held = {name: optimizer.state.get(parameter, {}) for name, parameter in named}
            roots.append(
                {
                    name: ((one["exp_avg_sq"].double() / (1 - 0.999 ** int(one["step"]))).sqrt() + 1e-8).rsqrt()
                    for name, one in held.items()
                    if one
                }
            )

    callback, seen = EntanglementCallback(every=1, metric="adam"), Moments(model)
    make_trainer(
        "dpo", model, tiny_tokenizer, tmp_path, [callback, seen], max_steps=3, optim="adamw_torch", learning_rate=1e-3
    ).train()
    assert [record.step for record in callback.records] == [2, 3]
    for record in callback.records:
        assert record.source == "piggyback"
        want = weighted(seen.models[record.step - 1], record.batch, roots[record.step - 1])
        got = torch.stack([record.gram.chosen_sq, record.gram.rejected_sq, record.gram.inner])
        scale = torch.stack([want[0], want[1], (want[0] * want[1]).sqrt()])
        assert float(((got - want).abs() / scale).max()) < 1e-5


def weighted(model: Any, batch: Any, roots: dict[str, torch.Tensor]) -> torch.Tensor:
    """Gram entries of gradients times the metric's root, float64, `[3, B]`."""
    model, rows = model.double().eval(), []
    for row in range(2 * len(batch)):
        ids, marks = batch.row(row)
        logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        logp = logps.gather(1, ids[1:, None])[:, 0][marks[1:].bool()].sum()
        grads = torch.autograd.grad(logp, list(model.parameters()))
        names = [name for name, _ in model.named_parameters()]
        rows.append(torch.cat([(grad * roots[name]).flatten() for name, grad in zip(names, grads, strict=True)]))
    chosen, rejected = torch.stack(rows).chunk(2)
    return torch.stack([chosen.square().sum(1), rejected.square().sum(1), (chosen * rejected).sum(1)])


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"every": 1.5}, {"probe_every": 0}, {"mode": "fast"}, {"pairing": "pairs"}, {"metric": "sgd"},
     {"on_error": "ignore"}, {"memory_budget": "much"}, {"probe_data": 3}, {"probe_data": []},
     {"probe_data": [{"prompt": "a", "chosen": "b"}]}],
)  # fmt: skip
def test_arguments_outside_of_what_is_accepted(options: dict[str, Any]) -> None:
    with pytest.raises(GradentError, match=next(iter(options))):
        EntanglementCallback(**options)
