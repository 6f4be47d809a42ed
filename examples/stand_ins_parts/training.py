"""The selection experiment: DPO on parts of the data, and what becomes of pairs that were held out.

Letters: B pairs, N = 2B rows (chosen, then rejected), L tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradent import PairBatch

__all__ = ["Trial", "fine_tune", "train_on"]

BETA = 0.1


class Trial:
    """One model, its pool of pairs and those held out, and their log-probs before training."""

    def __init__(
        self, model: Path, pool: list[dict[str, str]], held: list[dict[str, str]], *, steps: int, rate: float,
        max_length: int,
    ) -> None:  # fmt: skip
        self.path, self.steps, self.rate = model, steps, rate
        tokenizer = AutoTokenizer.from_pretrained(model)
        base = self.load()
        self.pool, self.held = (
            PairBatch.from_text(
                tokenizer, *([row[key] for row in rows] for key in ("prompt", "chosen", "rejected")),
                max_length=max_length, add_eos=tokenizer.eos_token is not None,
            )
            for rows in (pool, held)
        )  # fmt: skip
        with torch.no_grad():
            self.pool_before, self.held_before = (_all_logps(base, batch) for batch in (self.pool, self.held))

    def load(self) -> nn.Module:
        """The model as it was before training.

        Returns:
            The model, in eval mode: no dropout.
        """
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()


def fine_tune(model: Path, rows: list[dict[str, str]], folder: Path, *, steps: int, rate: float = 1e-3) -> Path:
    """SFT on the chosen responses of some pairs, as it mostly comes before DPO: AdamW, 8 responses a step.

    Args:
        model: directory of the model.
        rows: the pairs.
        folder: where the result is saved.
        steps: how many.
        rate: learning rate.

    Returns:
        The folder.
    """
    trial = Trial(model, rows, rows[:1], steps=steps, rate=rate, max_length=256)
    tuned, draw = trial.load(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        numbers = torch.randint(len(rows), (8,), generator=draw).tolist()
        batch = trial.pool.select(numbers)
        loss = -(_logps(tuned, batch)[0] / batch.chosen_len).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
    tuned.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def train_on(trial: Trial, chosen: list[int], seed: int, *, batch: int = 8) -> dict[str, float]:
    """Train by DPO on some pairs of the pool, with AdamW.

    Args:
        trial: the model and the pairs.
        chosen: numbers of the pairs.
        seed: of their order.
        batch: pairs a step.

    Returns:
        Mean change of the held-out chosen and rejected log-probs in nats, and the share of held-out pairs whose margin
        grew.
    """
    model, draw = trial.load(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.rate, weight_decay=0.0)
    order: list[int] = []
    for _ in range(trial.steps):
        while len(order) < batch:
            order += torch.tensor(chosen)[torch.randperm(len(chosen), generator=draw)].tolist()
        numbers, order = order[:batch], order[batch:]
        logps = _logps(model, trial.pool.select(numbers)) - trial.pool_before[:, numbers]
        loss = -nn.functional.logsigmoid(BETA * (logps[0] - logps[1])).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        change = _all_logps(model, trial.held) - trial.held_before
    return {
        "chosen": float(change[0].mean()), "rejected": float(change[1].mean()),
        "accuracy": float((change[0] > change[1]).float().mean()),
    }  # fmt: skip


def _all_logps(model: nn.Module, batch: PairBatch, at_once: int = 8) -> Tensor:
    parts = [range(start, min(len(batch), start + at_once)) for start in range(0, len(batch), at_once)]
    return torch.cat([_logps(model, batch.select(list(part))) for part in parts], dim=1)


def _logps(model: nn.Module, batch: PairBatch) -> Tensor:
    """Log-probs of chosen and rejected, `[2, B]`."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    return (tokens * batch.completion_mask[:, 1:]).sum(1).view(2, -1)
