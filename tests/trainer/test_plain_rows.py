"""Where no configuration says what rows are, the data does: pairs, groups, or one sentence that they are neither."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from gradent import EntanglementCallback, attach
from gradent.trainer.records.row_step import RowStepRecord
from tests.trainer.row_truth import assert_rows, names_of
from tests.trainer.runs import Gradients, llama
from tests.truth import assert_exact, truth

Row = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and response

PAIRS: list[Row] = [
    ((1, 40, 41), (50, 51, 52)), ((1, 42, 43), (53, 54)), ((1, 40, 41), (60, 61)), ((1, 42, 43), (62, 63, 64)),
]  # fmt: skip
"""Two prompts, two responses each: a first half, and a second half with its prompts."""
ONE_PROMPT: list[Row] = [((1, 40, 41), (50 + number, 60, 70 + number)) for number in range(4)]
ROLLOUTS: list[Row] = [
    ((1, 40), (50, 51)), ((1, 40), (52, 53)), ((1, 40), (54,)), ((1, 41, 42), (55, 56)), ((1, 41, 42), (57, 58)),
    ((1, 41, 42), (59, 60)),
]  # fmt: skip


def padded(rows: list[Row]) -> dict[str, Tensor]:
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids, mask, marks = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for number, (prompt, response) in enumerate(rows):
        stop = len(prompt) + len(response)
        ids[number, :stop] = torch.tensor(prompt + response)
        mask[number, :stop], marks[number, len(prompt) : stop] = 1, 1
    return {"input_ids": ids, "attention_mask": mask, "marks": marks}


def logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    values = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (values * batch["marks"][:, 1:]).sum(1)


def weighted(*weights: float) -> Callable[[Tensor], Tensor]:
    """A loss that raises rows of positive weight."""
    return lambda values: -(values * torch.tensor(weights)).sum()


def ipo(values: Tensor) -> Tensor:
    """Of a margin that is large for the first pair already, which is turned round."""
    chosen, rejected = values.chunk(2)
    return ((chosen - rejected + torch.tensor([90.0, -90.0])) ** 2).mean() / 100


class WithLoss(Trainer):
    """A Trainer with a loss of rows' log-probs."""

    loss_of_rows: Any

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = type(self).loss_of_rows(logps(model, inputs))
        return (loss, None) if return_outputs else loss


def settings(out: Path, **arguments: Any) -> TrainingArguments:
    return TrainingArguments(**{
        "output_dir": str(out), "max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "remove_unused_columns": False, "disable_tqdm": True, "logging_steps": 1, "optim": "sgd", "seed": 7,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **arguments,
    })  # fmt: skip


def train(loss: Callable[[Tensor], Tensor], rows: list[Row], out: Path) -> tuple[Any, Gradients, Trainer]:
    """Two steps on the same batch, in its order."""
    model = llama()
    callback, seen = EntanglementCallback(every=1, alert=None, on_error="raise", out=out / "records"), Gradients(model)
    trainer = type("OwnLoss", (WithLoss,), {"loss_of_rows": staticmethod(loss)})(
        model, settings(out, per_device_train_batch_size=len(rows)), train_dataset=[0] * 2 * len(rows),
        data_collator=lambda _: padded(rows), callbacks=[callback, seen],
    )  # fmt: skip
    trainer.train()
    return callback, seen, trainer


def said_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.getMessage() for line in caplog.records if line.name == "gradent"]


def check_groups(callback: Any, seen: Gradients, group: list[int]) -> None:
    assert len(callback.records) == 2
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert record.source == "piggyback" and record.rows.group.tolist() == group
        assert_rows(record, before, grads, lr=1e-3)


def check_pairs(callback: Any, seen: Gradients) -> None:
    assert len(callback.records) == 2
    for record, before in zip(callback.records, seen.models, strict=False):
        assert record.source == "piggyback" and len(record.gram) == 2
        assert [record.batch.row(row)[0].tolist() for row in range(4)] == [[*prompt, *text] for prompt, text in PAIRS]
        assert_exact(record.gram, truth(before, record.batch, dtype=torch.float64), record.batch, 1e-5)


def test_rollouts_with_signed_weights_are_groups(tmp_path: Path) -> None:
    callback, seen, trainer = train(weighted(0.5, -0.2, -0.3, 0.1, 0.3, -0.4), ROLLOUTS, tmp_path)
    check_groups(callback, seen, [0, 0, 0, 1, 1, 1])
    for record in callback.records:
        want = torch.tensor([0.5, -0.2, -0.3, 0.1, 0.3, -0.4], dtype=torch.float64)
        torch.testing.assert_close(record.rows.weight, want, rtol=1e-4, atol=0)
    assert "gradent/group/cosine" in names_of(trainer.state.log_history)
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["rows.jsonl"]


def test_a_row_that_nothing_moves_is_of_its_prompt_s_group(tmp_path: Path) -> None:
    callback, _, _ = train(weighted(0.5, 0.0, -0.3, 0.0, 0.0, -0.4), ROLLOUTS, tmp_path)
    for record in callback.records:
        assert record.rows.group.tolist() == [0, 0, 1] and record.inactive == 3
        assert (record.groups, record.flat_groups) == (2, 0)


def test_chosen_and_rejected_halves_of_the_same_prompts_are_pairs(tmp_path: Path) -> None:
    callback, seen, trainer = train(weighted(0.2, 0.3, -0.2, -0.1), PAIRS, tmp_path)
    check_pairs(callback, seen)
    assert [record.verdict.d_w.tolist() for record in callback.records] == [pytest.approx([0.4, 0.6])] * 2
    assert "gradent/cosine" in names_of(trainer.state.log_history)


def test_pairs_that_a_loss_has_turned_round_are_pairs(tmp_path: Path) -> None:
    callback, seen, _ = train(ipo, PAIRS, tmp_path)
    check_pairs(callback, seen)
    assert [(record.verdict.d_w > 0).tolist() for record in callback.records] == [[False, True]] * 2


@pytest.mark.parametrize("weights", [(0.3, -0.1, 0.2, -0.4), (-0.3, 0.1, -0.2, 0.4), (0.3, 0.1, 0.2, -0.6)])
def test_halves_that_share_a_prompt_by_chance_are_a_group(weights: tuple[float, ...], tmp_path: Path) -> None:
    callback, seen, _ = train(weighted(*weights), ONE_PROMPT, tmp_path)
    check_groups(callback, seen, [0, 0, 0, 0])


def test_halves_of_one_prompt_in_the_order_of_pairs_are_not_guessed(caplog: pytest.LogCaptureFixture) -> None:
    """All raised rows before all lowered ones: a later batch of that group tells, and this one is left out."""
    model = llama()
    with caplog.at_level(logging.WARNING, "gradent"), attach(model) as recorder:
        found = []
        for weights in ((0.3, 0.1, -0.2, -0.4), (0.3, -0.1, 0.2, -0.4), (0.3, 0.1, -0.2, -0.4)):
            weighted(*weights)(logps(model, padded(ONE_PROMPT))).backward()
            found.append(recorder.harvest())
    assert found[0] is None and [len(part.rows) for part in found[1:]] == [4, 4]
    unsure, told = said_in(caplog)
    assert "by chance" in unsure and "pairing= and groups= do" in unsure and "for groups" in told


@pytest.mark.parametrize("fresh", [True, False], ids=["other batches", "one batch again"])
def test_the_order_of_pairs_in_batch_after_batch_is_no_chance(fresh: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A group of four comes in that order once in 6 times, three in a row once in 216; one that is used again, not."""
    model = llama()
    with caplog.at_level(logging.WARNING, "gradent"), attach(model) as recorder:
        found = []
        for number in range(4):
            rows = [(prompt, (*response, 80 + number * fresh)) for prompt, response in ONE_PROMPT]
            weighted(0.3, 0.1, -0.2, -0.4)(logps(model, padded(rows))).backward()
            found.append(recorder.harvest())
    assert [part is None for part in found] == ([True, True, False, False] if fresh else [True] * 4)
    assert len(said_in(caplog)) == 1 and all(len(part.gram) == 2 for part in found if part is not None)


def test_one_batch_with_many_pairs_is_no_chance() -> None:
    """Preference data may have several pairs of a prompt."""
    rows = [((1, 40 + number // 2), (50 + number, 60)) for number in range(8)]
    rows += [(prompt, (*response, 70)) for prompt, response in rows]
    model = llama()
    with attach(model) as recorder:
        weighted(*[0.1] * 8, *[-0.1] * 8)(logps(model, padded(rows))).backward()
        found = recorder.harvest()
    assert len(found.gram) == 8


@pytest.mark.parametrize("split", [False, True], ids=["one forward", "two forwards"])
@pytest.mark.parametrize(
    ("rows", "weights", "kind"),
    [
        (PAIRS, (0.2, 0.3, -0.2, -0.1), "pairs"),
        (ONE_PROMPT, (0.3, -0.1, 0.2, -0.4), "groups"),
        (ROLLOUTS, (0.5, -0.2, -0.3, 0.1, 0.3, -0.4), "groups"),
        (PAIRS, (0.2, 0.3, 0.2, 0.1), "nothing"),
    ],
)
def test_attach_finds_out(
    rows: list[Row], weights: tuple[float, ...], kind: str, split: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, half = llama(), len(rows) // 2
    forwards = [rows[:half], rows[half:]] if split else [rows]
    with caplog.at_level(logging.WARNING, "gradent"), attach(model) as recorder:
        for _ in range(2):
            weighted(*weights)(torch.cat([logps(model, padded(part)) for part in forwards])).backward()
            found = recorder.harvest()
            if kind == "nothing":
                assert found is None
            elif kind == "pairs":
                assert len(found.gram) == half
                assert_exact(found.gram, truth(model, found.batch, dtype=torch.float64), found.batch, 1e-5)
            else:
                torch.testing.assert_close(found.rows.weight, torch.tensor(weights).double(), rtol=1e-4, atol=0)
                ids = [found.batch.row(row)[0].tolist() for row in range(len(rows))]
                assert ids == [[*prompt, *text] for prompt, text in rows]
    said = said_in(caplog)
    words = {"pairs": None, "groups": "for groups (rows of equal prompts)", "nothing": "every row is pushed up"}[kind]
    assert len(said) == (words is not None) and all(str(words) in line for line in said)


def test_a_first_batch_that_nothing_moves_decides_nothing(tmp_path: Path) -> None:
    """Halves that share their prompts, without a weight; then the weights of a group."""
    batches = iter([(0.0, 0.0, 0.0, 0.0), (0.3, -0.1, 0.2, -0.4)])
    callback, _, _ = train(lambda values: weighted(*next(batches))(values), ONE_PROMPT, tmp_path)
    (record,) = callback.records
    assert record.step == 2 and isinstance(record, RowStepRecord)


def classes(rows: list[Any]) -> dict[str, Tensor]:
    return {**{key: padded(ROLLOUTS)[key] for key in ("input_ids", "attention_mask")}, "labels": torch.arange(6) % 2}


@pytest.mark.parametrize("kind", ["masked", "causal", "classes"])
def test_what_has_no_pairs_and_no_groups_is_told_once(
    kind: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing besides: no records, no names in the logs, no file, and the bits of a run without."""
    tiny_tokenizer.add_special_tokens({"mask_token": "<eos>"})
    texts = [{"input_ids": list(range(3 + number, 15 + number))} for number in range(16)]
    collate: Any = DataCollatorForLanguageModeling(tiny_tokenizer, mlm=kind == "masked")

    def run(callbacks: list[Any]) -> tuple[Trainer, dict[str, Tensor]]:
        torch.manual_seed(0)
        if kind == "masked":
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
            model: Any = BertForMaskedLM(BertConfig(vocab_size=259, **sizes))
        else:
            model = llama() if kind == "causal" else llama(kind=LlamaForSequenceClassification, num_labels=2)
        trainer = Trainer(
            model, settings(tmp_path, max_steps=3, per_device_train_batch_size=4), train_dataset=texts,
            data_collator=classes if kind == "classes" else collate, callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
        return trainer, {name: part.detach().clone() for name, part in model.named_parameters()}

    callback = EntanglementCallback(every=1, out=tmp_path / "records")
    with caplog.at_level(logging.WARNING, "gradent"):
        trainer, ours = run([callback])
    _, theirs = run([])
    assert not callback.records and callback.errors == 0
    assert len(said_in(caplog)) == 1, said_in(caplog)
    assert not names_of(trainer.state.log_history) and not (tmp_path / "records").exists()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
