"""What is measured of a model: log-probs, cosines, accuracy and forgetting, on held-out statements."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gradent import PairBatch, measure
from gradent.demo.task import Task, draw_answers, tokenize_style
from gradent.demo.train import sft_row
from gradent.measurement import sequence_logps
from gradent.record.masks import read_masks

__all__ = ["FIGURES", "Probe", "Watch"]

FIGURES = ("chosen", "rejected", "cosine", "label", "preferred", "label_right", "answers")
"""What `Probe.look` gives, each a mean over the held-out statements.

- `chosen`, `rejected`: log-prob of the response, nats.
- `cosine`: of the two gradients, over all parameters.
- `label`: log-prob of chosen's label token, nats.
- `preferred`: share of statements with `log π(chosen) > log π(rejected)`.
- `label_right`: share of statements whose right label is the most probable of all tokens where the label stands.
- `answers`: log-prob of answers with the right label, worded as SFT's in all four styles, EOS included; nats.
"""


class Probe:
    """The held-out statements of a task, in one style.

    Args:
        tokenizer: the model's.
        task: the task.
        style: a key of `STYLES`.
        seed: of the wording of the held-out answers.
    """

    def __init__(self, tokenizer: Any, task: Task, style: str, seed: int) -> None:
        pairs = tokenize_style(tokenizer, task.probe, style, task.label_words)
        self.batch = PairBatch.from_tokens(pairs)
        chosen, rejected = self.batch.input_ids.chunk(2)
        (self._rows, self._places) = torch.nonzero(chosen != rejected, as_tuple=True)
        if self._rows.tolist() != list(range(len(pairs))):
            raise ValueError(f"{style}: chosen and rejected of a statement do not differ in exactly one token.")
        self.differing = self._places - torch.tensor([len(prompt) for prompt, _, _ in pairs])
        rows = [sft_row(tokenizer, *texts) for texts in draw_answers(seed, task.probe, task.label_words)]
        self._answers = _pad(rows)

    def glance(self, model: Any) -> dict[str, float]:
        """The log-probs alone.

        Args:
            model: any causal LM.

        Returns:
            `chosen` and `rejected` of `FIGURES`.
        """
        chosen, rejected = sequence_logps(model, self.batch)
        return {"chosen": float(chosen.mean()), "rejected": float(rejected.mean())}

    def look(self, model: Any) -> dict[str, float]:
        """Everything.

        Args:
            model: any causal LM.

        Returns:
            A value for each of `FIGURES`.
        """
        gram = measure(model, self.batch)
        return {
            "chosen": float(gram.chosen_logp.mean()),
            "rejected": float(gram.rejected_logp.mean()),
            "cosine": float(gram.cosine.nanmean()),
            "preferred": float((gram.chosen_logp > gram.rejected_logp).double().mean()),
            **self._label(model),
            "answers": self._answers_logp(model),
        }

    def _label(self, model: Any) -> dict[str, float]:
        chosen, attention = (part.chunk(2)[0] for part in (self.batch.input_ids, self.batch.attention_mask))
        with _asleep(model):
            logits = model(input_ids=chosen, attention_mask=attention).logits[self._rows, self._places - 1].double()
        right = chosen[self._rows, self._places]
        logps = logits.log_softmax(-1)[self._rows, right]
        return {
            "label": float(logps.mean()),
            "label_right": float((logits.argmax(-1) == right).double().mean()),
        }

    def _answers_logp(self, model: Any) -> float:
        ids, attention, marks = self._answers
        with _asleep(model):
            logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).double()
        return float((logps * marks[:, 1:]).sum(1).mean())

    def kept(self, trainer: Any) -> dict[str, float]:
        """Which tokens a masked trainer keeps of the held-out pairs.

        Args:
            trainer: a `TokenMaskedDPOTrainer`.

        Returns:
            `kept_label`: share of the differing tokens that are kept; `kept_shared`: of the tokens that chosen and
            rejected share (nan where there are none); `kept_chosen` and `kept_rejected`: of a side's tokens.
        """
        names = ("input_ids", "attention_mask", "completion_mask")
        with tempfile.TemporaryDirectory() as folder:
            path = trainer.export_masks({name: getattr(self.batch, name) for name in names}, Path(folder) / "masks")
            table = read_masks(path).to_pydict()
        label: list[bool] = []
        shared: list[bool] = []
        sides: dict[str, list[bool]] = {"chosen": [], "rejected": []}
        for pair, side, position, kept in zip(
            *(table[name] for name in ("pair", "side", "position", "kept")), strict=True
        ):
            (label if position == int(self.differing[pair]) else shared).append(kept)
            sides[side].append(kept)
        groups = {"label": label, "shared": shared, **sides}
        return {f"kept_{name}": sum(kept) / len(kept) if kept else float("nan") for name, kept in groups.items()}


class Watch(TrainerCallback):
    """Looks at the probe before the first step, every so many steps, and after the last.

    Args:
        probe: the probe.
        every: steps between two looks; 0 for the log-probs alone, before and after.

    Attributes:
        looks: step -> figures.
    """

    def __init__(self, probe: Probe, every: int) -> None:
        self.looks: dict[int, dict[str, float]] = {}
        self._probe, self._every = probe, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look."""
        self._look(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look, where it is time."""
        step = state.global_step
        if step == state.max_steps or (self._every and step % self._every == 0):
            self._look(kwargs["model"], step)

    def _look(self, model: Any, step: int) -> None:
        self.looks[step] = (self._probe.look if self._every else self._probe.glance)(model)

    @property
    def margin_gain(self) -> float:
        """By how much the margin grew from the first look to the last, nats."""
        first, *_, last = (look["chosen"] - look["rejected"] for look in self.looks.values())
        return last - first


@contextmanager
def _asleep(model: Any) -> Iterator[None]:
    """Evaluation mode, without gradients, for a while."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _pad(rows: Sequence[dict[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: int = 0) -> Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return column("input_ids"), (torch.arange(longest) < lengths[:, None]).long(), column("completion_mask")
