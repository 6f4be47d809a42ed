"""The paper's claims about tokens on the demo's model, and docs/img/tokens.png, the picture of one of its pairs.

    python -m scripts.token_claims

The demo's small model is fine-tuned as in `gradent demo`; then the 48 held-out pairs of the prefix+suffix style are
measured token by token. Chosen and rejected have the same tokens but for the label, so position by position each token
is before, at or after the place where they differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradent import PairBatch, measure, measure_tokens, token_effects
from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.settings import EMBEDDED
from gradent.demo.task import find_label_words, make_task, tokenize_style
from gradent.demo.train import one_thread, train_sft
from gradent.text import token_texts
from gradent.tokens.gram import TokenGram

TARGET = Path(__file__).resolve().parents[1] / "docs" / "img" / "tokens.png"
STYLE = "prefix+suffix"
PLACES = ("before", "at", "after")


@dataclass(frozen=True)
class Claim:
    """Figures of the tokens at one place, over all pairs.

    Attributes:
        entry: entries of the matrix's diagonal over the product of norms: the cosine of the two tokens' gradients.
        chosen: effects of a margin step on chosen tokens, over `‖g_w‖²`.
        rejected: effects of a margin step on rejected tokens, over `‖g_l‖²`.
    """

    entry: Tensor
    chosen: Tensor
    rejected: Tensor


def prepare(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PairBatch]:
    """The demo's model after SFT, and the held-out pairs.

    Args:
        seed: of the demo.

    Returns:
        `(model, tokenizer, batch)`.
    """
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), seed)
    words = find_label_words(tokenizer)
    task = make_task(
        seed=seed,
        train=EMBEDDED.train,
        probe=EMBEDDED.probe,
        answers=12 * EMBEDDED.train,
        label_words=words,
        usual_if_wrong=EMBEDDED.usual_if_wrong,
    )
    with one_thread():
        train_sft(model, tokenizer, task, EMBEDDED, seed=seed, advance=lambda step: None)
    return model, tokenizer, PairBatch.from_tokens(tokenize_style(tokenizer, task.probe, STYLE, words))


def read_claims(model: PreTrainedModel, batch: PairBatch) -> tuple[dict[str, Claim], list[TokenGram]]:
    """Measure the pairs and sort their tokens by place.

    Args:
        model: the model.
        batch: pairs whose responses differ in one token.

    Returns:
        `(figures by place, matrices)`.
    """
    grams = measure_tokens(model, batch, progress=False)
    effects = batch.split_tokens(token_effects(model, batch, toward="margin"))
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {place: [] for place in PLACES}
    whole = measure(model, batch)
    squares = zip(whole.chosen_sq.tolist(), whole.rejected_sq.tolist(), strict=True)
    for gram, (chosen, rejected), (chosen_sq, rejected_sq) in zip(grams, effects, squares, strict=True):
        (differing,) = (gram.chosen_ids != gram.rejected_ids).nonzero()[:, 0].tolist()
        parts = {
            "before": slice(0, differing),
            "at": slice(differing, differing + 1),
            "after": slice(differing + 1, None),
        }
        for place, part in parts.items():
            diagonal = gram.cosine.diagonal()[part]
            found[place].append((diagonal, chosen[part] / chosen_sq, rejected[part] / rejected_sq))
    claims = {
        place: Claim(*(torch.cat(column) for column in zip(*columns, strict=True))) for place, columns in found.items()
    }
    return claims, grams


def main() -> None:
    """Print the claims, draw the picture."""
    model, tokenizer, batch = prepare()
    claims, grams = read_claims(model, batch)
    table = Table("tokens", "figure", "mean", "negative", "positive")
    for place, claim in claims.items():
        for name, values in (
            ("cosine of chosen and rejected", claim.entry),
            ("margin step on chosen", claim.chosen),
            ("margin step on rejected", claim.rejected),
        ):
            signs = [f"{int(count)} of {len(values)}" for count in ((values < -1e-9).sum(), (values > 1e-9).sum())]
            table.add_row(place, name, f"{float(values.mean()):+.4f}", *signs)
    console = Console()
    console.print(table)
    splits = [gram.split() for gram in grams]
    total = sum(split.identical + split.differing for split in splits)
    console.print(
        f"Identical tokens give {sum(split.identical for split in splits) / total:.1%} of the inner products."
    )
    words = [token_texts(tokenizer, ids) for ids in (grams[0].chosen_ids, grams[0].rejected_ids)]
    grams[0].plot(*words, path=TARGET, title="A pair of the demo's prefix+suffix style")
    console.print(f"Wrote {TARGET.name}.")


if __name__ == "__main__":
    main()
