"""One run of one loss: train, measure the held-out pairs on the way, give rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from examples.paper.registry import NAMES, TRAINERS, make_trainer, trained_loss
from examples.paper.settings import Settings
from examples.paper.starts import Start
from gradent import losses
from gradent.demo.train import train_quietly, trainer_arguments
from gradent.measurement import measure
from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch
from gradent.theory.conditions import CASES, verdict

__all__ = ["Row", "run_loss", "summarize"]

Row = dict[str, Any]
_AT_ONCE = 16  # pairs


class Watch(TrainerCallback):
    """Measures held-out pairs at step 0, every few steps and at the last; the run is the same without it."""

    def __init__(self, batches: Sequence[PairBatch], every: int) -> None:
        self.grams: dict[int, PairGram] = {}
        self._batches, self._every = batches, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step."""
        self._measure(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where a measurement is due."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._measure(kwargs["model"], state.global_step)

    def _measure(self, model: Any, step: int) -> None:
        self.grams[step] = PairGram.join([measure(model, batch) for batch in self._batches])


def run_loss(name: str, start: Start, settings: Settings) -> list[Row]:
    """Train one loss.

    Args:
        name: a key of `registry.TRAINERS`.
        start: where from.
        settings: how much.

    Returns:
        A row a measured step, as `summarize` gives it.
    """
    held_out = start.held_out
    batches = [PairBatch.from_tokens(held_out[at : at + _AT_ONCE]) for at in range(0, len(held_out), _AT_ONCE)]
    watch = Watch(batches, settings.every)
    model = start.build()
    loss = trained_loss(name, torch.tensor([len(chosen) for _, chosen, _ in start.pairs]))
    rate = settings.rate
    if settings.optimizer == "sgd":
        gram = PairGram.join([measure(model, batch) for batch in batches])
        rate *= _reach(losses.get("dpo"), gram) / _reach(loss, gram)
    with trainer_arguments(start.seed) as common:
        trainer = make_trainer(name, start, model, settings, common, rate, [watch])
        train_quietly(trainer)
    about = {"model": start.name, "loss": NAMES[name], "trainer": TRAINERS[name].by, "seed": start.seed, "rate": rate}
    return [{**about, **row} for row in summarize(watch.grams, loss)]


def _reach(loss: losses.Loss, gram: PairGram) -> float:
    """Mean `d_w + d_l` where the policy is its own reference, but chosen a hair below it: there DPOP's hinge works."""
    judged = verdict(gram, loss, gram.chosen_logp + 1e-9, gram.rejected_logp)
    return (judged.d_w + judged.d_l).mean().item()


def summarize(grams: dict[int, PairGram], loss: losses.Loss) -> Iterable[Row]:
    """Means over the pairs, step by step.

    Args:
        grams: by step; those of step 0 are the reference's.
        loss: whose verdict is asked for.

    Yields:
        `step`, `chosen`, `rejected` (log-probs), `chosen_mean`, `rejected_mean` (a token), `cosine`, `d_w`, `d_l`,
        `contrasting` (share of pairs with `d_l` other than 0), and the share of pairs in each case.
    """
    reference = grams[0]
    for step, gram in grams.items():
        judged = verdict(gram, loss, reference.chosen_logp, reference.rejected_logp)
        yield {
            "step": step,
            "chosen": gram.chosen_logp.mean().item(),
            "rejected": gram.rejected_logp.mean().item(),
            "chosen_mean": (gram.chosen_logp / gram.chosen_len).mean().item(),
            "rejected_mean": (gram.rejected_logp / gram.rejected_len).mean().item(),
            "cosine": gram.cosine.nanmean().item(),
            "d_w": judged.d_w.mean().item(),
            "d_l": judged.d_l.mean().item(),
            "contrasting": (judged.d_l != 0).double().mean().item(),
            **{name: (judged.case == number).double().mean().item() for number, name in CASES.items()},
        }
