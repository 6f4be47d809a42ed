"""A training loop without a trainer: `attach`, and `harvest` before the optimizer's step.

python examples/custom_loop.py
"""

import torch
from rich.console import Console
from tiny import make_model, make_pairs, make_tokenizer

from gradent import PairBatch, attach


def main() -> None:
    """A few steps of a hinge loss, with what each does to the pairs of its batch."""
    torch.manual_seed(0)
    model, tokenizer, pairs = make_model(), make_tokenizer(), make_pairs(8)
    batch = PairBatch.from_text(tokenizer, pairs["prompt"], pairs["chosen"], pairs["rejected"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with attach(model) as recorder:
        for step in range(4):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
            chosen, rejected = (logps * batch.completion_mask[:, 1:]).sum(1).chunk(2)
            loss = torch.relu(2.0 - (chosen - rejected)).mean()
            loss.backward()
            found = recorder.harvest()
            if found is not None:
                shares = [f"{name} {share:.0%}" for name, share in found.verdict.fractions().items() if share]
                cosine = f"cosine {found.gram.cosine.mean():+.3f}, " if len(found.gram) else ""
                Console().print(f"step {step}: {cosine}{', '.join(shares)}; {found.inactive} of 8 pairs inactive")
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
