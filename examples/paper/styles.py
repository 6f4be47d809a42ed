"""Figures 3, 4a and 4b: the sentiment task, four styles of response, sentence and token level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from examples.paper.claims import judge_signs, spread
from examples.paper.comparisons import changes
from examples.paper.draw import CHOSEN, REJECTED, Panel, Row, draw_panels, series, write_rows
from examples.paper.lab import Lab, Outcome
from examples.paper.sentiment import SentimentStart
from gradent.demo.task import tokenize_style
from gradent.pairs.batch import PairBatch
from gradent.text import token_texts
from gradent.tokens.gram import TokenGram
from gradent.tokens.matrix import measure_tokens

__all__ = ["figure3", "figure4a", "figure4b", "look_at_tokens"]

_SINGLE, _SHORT, _LONG, _WHOLE = "single token", "short suffix", "long suffix", "prefix+suffix"
_LOW = -0.9  # a cosine from which a decline can hardly show
_COLOURS = {_SINGLE: "#2f8f5b", _SHORT: "#c77400", _LONG: "#b23a6f", _WHOLE: "#2b2f36"}


def _describe(lab: Lab) -> str:
    return f"DPO; {lab.over(lab.settings.demo.probe)}"


def figure3(lab: Lab) -> Outcome:
    """Chosen and rejected log-probs under DPO in four styles of response.

    Args:
        lab: where from and where to.

    Returns:
        What was found.
    """
    runs = lab.styles()
    caption = f"Figure 3. {_describe(lab)}"
    panels = [
        Panel(
            style,
            {"chosen": (CHOSEN, series(rows, "chosen")), "rejected": (REJECTED, series(rows, "rejected"))},
            "log-prob (nats)",
        )
        for style, rows in runs.items()
    ]
    draw_panels(lab.image("figure3"), panels, caption, columns=4)
    write_rows(lab.table("figure3"), [row for rows in runs.values() for row in rows])
    chosen = {style: changes(rows, "chosen") for style, rows in runs.items()}
    rejected = {style: changes(rows, "rejected") for style, rows in runs.items()}
    where, end = "Figure 3", "held-out mean at the end against the start"
    claims = [
        judge_signs(where, "Single token: chosen rises", paper="rises", rule=end,
                    evidence={_SINGLE: (+1, chosen[_SINGLE])}),
        judge_signs(where, "Chosen rises in the single token alone: it falls in the other styles", paper="falls",
                    rule=end, evidence={style: (-1, chosen[style]) for style in (_SHORT, _LONG, _WHOLE)}),
        judge_signs(where, "Chosen falls more for the long suffix than for the short one", paper="falls more",
                    rule="difference of the two changes below 0",
                    evidence={"long − short": (-1, _less(chosen[_LONG], chosen[_SHORT]))}),
        judge_signs(where, "Rejected falls in every style", paper="falls", rule=end,
                    evidence={style: (-1, values) for style, values in rejected.items()}),
    ]  # fmt: skip
    return Outcome("figure3", claims, ("paper-figure3.png", caption))


def _less(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _over_steps(rows: Sequence[Row], *, of: str = "mean") -> list[float]:
    """Mean, or largest, of the cosine over the steps, one a seed."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    found = []
    for seed in seeds:
        mine = [row["cosine"] for row in rows if row["seed"] == seed]
        found.append(max(mine) if of == "largest" else sum(mine) / len(mine))
    return found


def figure4a(lab: Lab) -> Outcome:
    """The cosine of the two gradients under DPO in three styles of response.

    Args:
        lab: where from and where to.

    Returns:
        What was found.
    """
    runs = {style: rows for style, rows in lab.styles().items() if style != _WHOLE}
    caption = f"Figure 4a. {_describe(lab)}"
    lines = {style: (_COLOURS[style], series(rows, "cosine")) for style, rows in runs.items()}
    draw_panels(lab.image("figure4a"), [Panel("cosine of chosen's and rejected's gradients", lines, "cosine")], caption)
    rows = [row for each in runs.values() for row in each]
    write_rows(
        lab.table("figure4a"), [{name: row[name] for name in ("style", "seed", "step", "cosine")} for row in rows]
    )
    where, over = "Figure 4a", "mean over the measured steps"
    means = {style: _over_steps(rows) for style, rows in runs.items()}
    claims = [
        judge_signs(where, "Single token: the cosine stays negative", paper="negative",
                    rule="largest of the measured steps below 0",
                    evidence={_SINGLE: (-1, _over_steps(runs[_SINGLE], of="largest"))}),
        judge_signs(where, "Short and long suffix: the cosine is positive", paper="positive", rule=f"{over} above 0",
                    evidence={style: (+1, means[style]) for style in (_SHORT, _LONG)}),
        judge_signs(where, "The cosine grows with the suffix", paper="grows", rule=f"difference of {over} above 0",
                    evidence={"short − single": (+1, _less(means[_SHORT], means[_SINGLE])),
                              "long − short": (+1, _less(means[_LONG], means[_SHORT]))}),
    ]  # fmt: skip
    first = [row["cosine"] for row in runs[_SINGLE] if row["step"] == 0]
    moved = changes(runs[_SINGLE], "cosine")
    note = (
        "In the paper the single token's cosine also declines quickly. Here it starts at "
        f"{sum(first) / len(first):.4f} and changes by {spread(moved, '+.4f')}"
        + (": from there a decline cannot show, and it is not judged." if max(first) < _LOW else ".")
    )
    return Outcome("figure4a", claims, ("paper-figure4a.png", caption), [note])


@dataclass(frozen=True)
class TokenLook:
    """Cosines of one pair's token gradients.

    Attributes:
        label: of the two tokens that differ.
        same: of each identical token in chosen with itself in rejected, after the label.
        before: the same, before the label: one prefix, so 1 by construction.
    """

    label: float
    same: tuple[float, ...]
    before: tuple[float, ...]


def look_at_tokens(gram: TokenGram) -> TokenLook:
    """The diagonal of a pair that differs in one token.

    Args:
        gram: of the pair.

    Returns:
        Its cosines.
    """
    (differing,) = (gram.chosen_ids != gram.rejected_ids).nonzero().flatten().tolist()
    diagonal = gram.cosine.diagonal().tolist()
    return TokenLook(diagonal[differing], tuple(diagonal[differing + 1 :]), tuple(diagonal[:differing]))


def _measure(start: SentimentStart, count: int) -> list[TokenGram]:
    pairs = tokenize_style(start.tokenizer, start.task.probe[:count], _WHOLE, start.task.label_words)
    return measure_tokens(start.model, PairBatch.from_tokens(pairs), progress=False)


def figure4b(lab: Lab) -> Outcome:
    """The cosine of every chosen with every rejected token's gradient, prefix+suffix, after SFT.

    Args:
        lab: where from and where to.

    Returns:
        What was found.
    """
    rows: list[Row] = []
    caption = "Figure 4b. Prefix+suffix, the first held-out pair after SFT, first seed"
    for seed in lab.settings.seeds:
        start = lab.sentiment(seed)
        grams = _measure(start, lab.settings.tokens)
        if seed == lab.settings.seeds[0]:
            first = grams[0]
            texts = (token_texts(start.tokenizer, ids.tolist()) for ids in (first.chosen_ids, first.rejected_ids))
            first.plot(*texts, path=lab.image("figure4b"), title="Token gradients: cosine")
        for pair, gram in enumerate(grams):
            look = look_at_tokens(gram)
            kinds = {"label": (look.label,), "identical, after": look.same, "identical, before": look.before}
            rows += [
                {"seed": seed, "pair": pair, "tokens": kind, "place": place, "cosine": value}
                for kind, values in kinds.items()
                for place, value in enumerate(values)
            ]
    write_rows(lab.table("figure4b"), rows)
    where = "Figure 4b"
    label, same = _seed_values(rows, "label"), _seed_values(rows, "identical, after")
    count = lab.settings.tokens
    claims = [
        judge_signs(where, "The label tokens' gradients point apart", paper="below 0",
                    rule=f"mean cosine of the two label tokens over {count} pairs below 0",
                    evidence={"label": (-1, [sum(each) / len(each) for each in label])}),
        judge_signs(where, "Identical tokens' gradients point the same way, far more than the label's",
                    paper="significantly higher", rule=f"mean cosine of identical tokens after the label over {count} "
                    "pairs above 0, and above the label's",
                    evidence={"identical": (+1, [sum(each) / len(each) for each in same]),
                              "identical − label": (+1, [sum(a) / len(a) - sum(b) / len(b)
                                                         for a, b in zip(same, label, strict=True)])}),
    ]  # fmt: skip
    largest = [max(each) for each in same]
    note = (
        "The paper has some identical tokens close to 1. Those before the label have one prefix in both responses, and "
        "one gradient: their cosine is 1 whatever the model, so they are left out of the rules. After the label the "
        f"largest is {spread(largest)}."
    )
    return Outcome("figure4b", claims, ("paper-figure4b.png", caption), [note])


def _seed_values(rows: Sequence[Row], kind: str) -> list[list[float]]:
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return [[row["cosine"] for row in rows if row["seed"] == seed and row["tokens"] == kind] for seed in seeds]
