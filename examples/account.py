"""What moved it: the account of every step, in a training loop of one's own.

python examples/account.py
"""

from dataclasses import replace

import torch
from rich.console import Console
from tiny import make_model, make_pairs, make_tokenizer

from gradent import PairBatch, attach


def log_probs(model: torch.nn.Module, batch: PairBatch) -> torch.Tensor:
    """Log-probs of all responses.

    Args:
        model: the model.
        batch: B pairs.

    Returns:
        `[2B]`, chosen first, then rejected.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return (logps * batch.completion_mask[:, 1:]).sum(1)


def main() -> None:
    """Nine steps of DPO under AdamW, and by how many nats each source moved chosen and rejected."""
    torch.manual_seed(0)
    console, model, tokenizer, pairs = Console(), make_model(), make_tokenizer(), make_pairs(32)
    everything = PairBatch.from_text(tokenizer, pairs["prompt"], pairs["chosen"], pairs["rejected"])
    with torch.no_grad():
        reference = log_probs(model, everything)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    with attach(model, optimizer=optimizer) as recorder:
        for step in range(1, 10):
            picked = torch.randperm(32)[:4].tolist()
            batch, rows = everything.select(picked), [*picked, *(32 + pair for pair in picked)]
            logps = log_probs(model, batch)
            chosen, rejected = (logps - reference[rows]).chunk(2)
            (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            found = recorder.harvest()  # after clipping, before the optimizer's step
            optimizer.step()
            optimizer.zero_grad()
            if found is None or found.attribution is None:
                console.print(f"step {step}: no account; before its first step, Adam has no second moment")
                continue
            with torch.no_grad():
                realised = (log_probs(model, batch) - logps).double()
            account = replace(found.attribution, realised=realised)
            console.print(f"step {step}: {account.explained:.1%} of the realised changes explained")
            for side, half in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
                means = {source: float(nats[half].mean()) for source, nats in account.moved.items()}
                parts = ", ".join(f"{source} {mean:+.3f}" for source, mean in means.items() if mean)
                console.print(f"  {side} {realised[half].mean():+.3f} nats: {parts}", soft_wrap=True)


if __name__ == "__main__":
    main()
