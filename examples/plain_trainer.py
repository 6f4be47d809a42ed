"""A plain `transformers.Trainer` with a preference loss of one's own: the callback works the same.

python examples/plain_trainer.py
"""

import tempfile
from typing import Any

import torch
from rich.console import Console
from tiny import make_model, make_pairs, make_tokenizer
from transformers import Trainer, TrainingArguments

from gradent import EntanglementCallback


class MarginTrainer(Trainer):
    """A reference-free margin loss on the mean log-prob of a token, as SimPO's without its target margin."""

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
        """The loss of a batch whose first half is chosen and whose second half is rejected.

        Args:
            model: the model.
            inputs: input_ids, attention_mask and completion_mask, `[2B, L]`.
            **kwargs: unused.

        Returns:
            The mean loss of the B pairs.
        """
        marks = inputs["completion_mask"][:, 1:]
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        logps = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        chosen, rejected = ((logps * marks).sum(1) / marks.sum(1)).chunk(2)
        return -torch.nn.functional.logsigmoid(2.0 * (chosen - rejected)).mean()


def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """All chosen rows, then all rejected rows, padded on the right.

    Args:
        rows: B rows with prompt, chosen and rejected.

    Returns:
        `[2B, L]` tensors.
    """
    tokenizer = make_tokenizer()
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    starts = torch.tensor([len(tokenizer(row["prompt"])["input_ids"]) for row in rows] * 2)
    places = torch.arange(batch["input_ids"].shape[1])[None]
    marks = (places >= starts[:, None]) * batch["attention_mask"]
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "completion_mask": marks}


def main() -> None:
    """Train a few steps and show the shares of the cases."""
    torch.manual_seed(0)
    callback = EntanglementCallback(every=1, realised=True)
    with tempfile.TemporaryDirectory() as out:
        trainer = MarginTrainer(
            model=make_model(),
            args=TrainingArguments(
                output_dir=out, max_steps=6, per_device_train_batch_size=8, logging_steps=3, learning_rate=1e-3,
                report_to="none", use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
                disable_tqdm=True,
            ),
            train_dataset=make_pairs(),
            data_collator=collate,
            callbacks=[callback],
        )  # fmt: skip
        trainer.train()
    for record in callback.records:
        moved = f"chosen {record.chosen_realised.mean():+.3f}, rejected {record.rejected_realised.mean():+.3f}"
        shares = [f"{name} {share:.0%}" for name, share in record.verdict.fractions().items() if share]
        Console().print(f"step {record.step} ({record.source}): {', '.join(shares)}; log-probs moved: {moved}")


if __name__ == "__main__":
    main()
