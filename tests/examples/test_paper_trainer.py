"""`examples/paper`: its trainer's loss, gradient and trajectory, and what TRL's trainers are said to train."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
from datasets import Dataset
from transformers import TrainingArguments

from examples.paper.registry import make_trainer, trained_loss
from examples.paper.settings import SMALL, Settings
from examples.paper.starts import Start, make_start
from examples.paper.trainer import PairTrainer, completion_logps
from gradent import losses
from gradent.demo.task import TokenPair
from gradent.demo.train import PairCollator, one_thread, train_quietly, trainer_arguments

TINY = replace(SMALL, train=48, probe=6, every=1, demo=replace(SMALL.demo, train=48, probe=6, sft_steps=20))
PAIRS: list[TokenPair] = [([5, 6], [7, 8, 9], [10, 8]), ([5], [11], [12, 9, 4, 3]), ([4, 4], [7, 3], [9, 3])]


@pytest.fixture(scope="module", autouse=True)
def thread() -> Iterator[None]:
    """More threads do not help models this small."""
    with one_thread():
        yield


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        remove_unused_columns=False, per_device_train_batch_size=2, **settings,
    )  # fmt: skip


def naive_logps(model: Any, pairs: list[TokenPair]) -> dict[str, Tensor]:
    """Summed log-probs, an unpadded row at a time."""
    found: dict[str, Tensor] = {}
    for side, name in ((1, "chosen_logp"), (2, "rejected_logp")):
        rows = []
        for pair in pairs:
            row = torch.tensor([pair[0] + pair[side]])
            steps = torch.log_softmax(model(row).logits[0, :-1], -1).gather(1, row[0, 1:, None])[:, 0]
            rows.append(steps[len(pair[0]) - 1 :].sum())
        found[name] = torch.stack(rows)
    return found


@pytest.mark.parametrize("name", losses.available())
def test_the_trainers_loss_and_gradient_are_the_losses(name: str, tmp_path: Path, tiny_gpt2: Any) -> None:
    loss = losses.get(name)
    rows = Dataset.from_list([{"pair": number} for number in range(len(PAIRS))])
    trainer = PairTrainer(
        loss=loss, pairs=PAIRS, model=copy.deepcopy(tiny_gpt2), args=arguments(tmp_path), train_dataset=rows
    )
    with torch.no_grad():  # away from the reference, where DPOP has a kink
        for number, parameter in enumerate(trainer.model.parameters()):
            parameter += 0.03 * torch.cos(torch.arange(parameter.numel()).view_as(parameter) + number)
    order = [2, 0, 1]
    pairs = [PAIRS[number] for number in order]
    given = naive_logps(trainer.model, pairs)
    with torch.no_grad():
        given |= {f"ref_{key}": value for key, value in naive_logps(tiny_gpt2, pairs).items()}
    given |= {
        f"{side}_len": torch.tensor([len(pair[at]) for pair in pairs]) for at, side in ((1, "chosen"), (2, "rejected"))
    }
    wanted = loss.value(**given).mean()
    got = trainer.compute_loss(trainer.model, trainer.data_collator([rows[number] for number in order]))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    parameters = list(trainer.model.parameters())
    for ours, theirs in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
    shuffled = loss.value(**{key: value.roll(1) if key.startswith("rej") else value for key, value in given.items()})
    assert abs(shuffled.mean() - wanted) > 1e-6  # a swapped row would be seen


@pytest.fixture(scope="module")
def start() -> Start:
    return make_start(TINY, "llama", 0)


def moved(name: str, start: Start, settings: Settings, *, own: losses.Loss | None = None) -> tuple[Tensor, Tensor]:
    """Weights before and after a run, by the registered trainer, or by PairTrainer on `own`."""
    model = start.build()
    before = torch.cat([each.detach().flatten().clone() for each in model.parameters()])
    with trainer_arguments(0) as common:
        if own is None:
            trainer = make_trainer(name, start, model, settings, common, settings.rate, [])
        else:
            trainer = make_trainer("rdpo", start, model, settings, common, settings.rate, [])
            trainer.pair_loss = own
        train_quietly(trainer)
    return before, torch.cat([each.detach().flatten() for each in model.parameters()])


def test_trained_on_dpo_it_goes_the_way_of_trl(start: Start) -> None:
    settings = replace(TINY, steps=6, batch=8, rate=0.1)
    before, theirs = moved("dpo", start, settings)
    _, ours = moved("dpo", start, settings, own=losses.get("dpo"))
    assert (theirs - before).norm() > 1e-2
    assert (ours - theirs).norm() < 1e-4 * (theirs - before).norm()
    _, other = moved("dpo", start, settings, own=losses.get("dpo", beta=0.11))
    assert (other - theirs).norm() > 1e-2 * (theirs - before).norm()


@pytest.mark.parametrize("name", ["ipo", "sppo", "simpo", "cpo"])
def test_trls_trainers_take_the_step_of_the_loss(name: str, start: Start) -> None:
    """One step on all pairs, so that CPO's average over the batch's tokens is that over all."""
    settings = replace(TINY, steps=1, batch=len(start.train), rate=1e-2)
    loss = trained_loss(name, torch.tensor([len(chosen) for _, chosen, _ in start.pairs]))
    before, theirs = moved(name, start, settings)
    _, ours = moved(name, start, settings, own=loss)
    assert (ours - theirs).norm() < 1e-4 * (theirs - before).norm()
    _, other = moved(name, start, settings, own=losses.get("rrhf"))
    assert (other - theirs).norm() > 1e-2 * (theirs - before).norm()


def test_the_differentiable_log_probs_are_those_of_the_rows(tiny_gpt2: Any) -> None:
    batch = PairCollator(PAIRS)([{"pair": number} for number in range(3)])
    naive = naive_logps(tiny_gpt2, PAIRS)
    torch.testing.assert_close(completion_logps(tiny_gpt2, batch), torch.cat(list(naive.values())))
