"""One measurement, every loss: which of them would raise chosen and lower rejected on these pairs?

The Gram entries belong to the model and the pairs, not to a loss, so one `measure` serves them all. Runs in seconds on
a small random model; put your own model and token ids in `build` for a real answer.

    python examples/which_loss.py
"""

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from gradent import PairBatch, losses, measure, verdict


def build() -> tuple[GPT2LMHeadModel, PairBatch]:
    """A random GPT-2 and four pairs whose responses end alike, so that their gradients overlap.

    Returns:
        The model and the batch.
    """
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    draw = torch.Generator().manual_seed(0)
    suffix = [70, 71, 72, 73]
    pairs = []
    for _ in range(4):
        prompt = torch.randint(1, 50, (6,), generator=draw).tolist()
        good, bad = torch.randint(50, 70, (2,), generator=draw).tolist()
        pairs.append((prompt, [good, *suffix], [bad, *suffix]))
    return model, PairBatch.from_tokens(pairs)


def rejected_twice(chosen_logp: torch.Tensor, rejected_logp: torch.Tensor) -> torch.Tensor:
    """A loss of our own: CPO's margin, with rejected counted twice.

    Args:
        chosen_logp: float64 `[B]`.
        rejected_logp: float64 `[B]`.

    Returns:
        The scalar loss of the batch.
    """
    return -torch.nn.functional.logsigmoid(0.1 * (chosen_logp - 2 * rejected_logp)).sum()


def main() -> None:
    """Measure once, then judge every loss."""
    model, batch = build()
    gram = measure(model, batch)
    table = Table(title=f"{len(batch)} pairs, mean cosine {gram.cosine.mean():.3f}")
    table.add_column("loss")
    for name in ("ideal", "both_down", "both_up", "reversed"):
        table.add_column(name.replace("_", " "), justify="right")
    candidates = [losses.get(name) for name in losses.available()] + [losses.from_callable(rejected_twice)]
    for loss in candidates:
        # At the start of training the reference model is the model itself.
        shares = verdict(gram, loss, gram.chosen_logp, gram.rejected_logp).fractions()
        table.add_row(loss.name, *(f"{shares[name]:.0%}" for name in ("ideal", "both_down", "both_up", "reversed")))
    Console().print(table)


if __name__ == "__main__":
    main()
