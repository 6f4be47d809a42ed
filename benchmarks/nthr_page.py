"""The section of docs/groups.md that benchmarks/results/nthr.csv fills: means over seeds with 95% intervals."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "groups.md"
BEGIN, END = "<!-- nthr: written by python -m benchmarks.nthr --page -->\n", "<!-- end of nthr -->\n"
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, 97.5%, by degrees of freedom from 1 on."""
ARMS = {
    "GRPO": "plain GRPO",
    "NTHR": "NTHR's rule",
    "random": "as many at random",
    "exact": "as many with the highest exact value",
    "no negatives": "no token penalized",
}
LARGE = 0.2
"""Share that first order leaves unexplained, above which the page warns."""
SOURCES = {
    "own": "itself",
    "positives": "the group's other positives",
    "negatives": "the group's negatives",
    "other_groups": "other groups",
    "momentum": "momentum",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half of its 95% interval (Student's t)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of one value a seed."""
        known = [value for value in values if math.isfinite(value)]
        if len(known) < 2:
            return cls(known[0] if known else math.nan, math.nan)
        quantile = QUANTILES[min(len(known) - 1, len(QUANTILES)) - 1]
        return cls(statistics.mean(known), quantile * statistics.stdev(known) / len(known) ** 0.5)

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half

    def nats(self) -> str:
        """With its sign."""
        return f"{self.mean:+.3f} ± {self.half:.3f}"

    def share(self) -> str:
        """In percent."""
        return f"{100 * self.mean:.1f}% ± {100 * self.half:.1f}"

    def plain(self) -> str:
        """As it is."""
        return f"{self.mean:.2f} ± {self.half:.2f}"


class Model:
    """The figures of one model: of several lines of one kind and seed the last counts."""

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        self.last = rows[-1]
        self._values = {(row["part"], row["arm"], row["figure"], int(row["seed"])): float(row["value"]) for row in rows}
        self.seeds = sorted({seed for *_, seed in self._values})

    def estimate(self, part: str, arm: str, figure: str, less: str | None = None) -> Estimate:
        """Of a figure; or of its difference from another arm's, seed by seed."""
        values = []
        for seed in self.seeds:
            value = self._values.get((part, arm, figure, seed))
            other = 0.0 if less is None else self._values.get((part, less, figure, seed))
            if value is not None and other is not None:
                values.append(value - other)
        return Estimate.of(values)

    def arms(self, part: str) -> list[str]:
        """Of a part, in the order of `ARMS`."""
        known = {arm for of, arm, *_ in self._values if of == part}
        return [arm for arm in ARMS if arm in known]

    def name(self) -> str:
        """As the page has it."""
        return "the tiny model" if self.last["model"] == "tiny" else self.last["model"]


def read(path: Path) -> list[Model]:
    """Every model of the results, in their order."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["model"] for row in rows))
    return [Model([row for row in rows if row["model"] == name]) for name in names]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"
    yield ""


def sources(models: Sequence[Model]) -> Iterator[str]:
    """What moves a positive in a step, and how often it is lowered."""

    def of(figure: str, form: str) -> list[str]:
        return [getattr(model.estimate("batches", "", figure), form)() for model in models]

    yield "**What moves a positive in a step of plain GRPO**, in nats to first order, and what share of them it lowers:"
    yield ""
    rows = [[text, *of(f"moved_{source}", "nats")] for source, text in SOURCES.items()]
    rows.append(["size of the negatives' part (mean of its absolute)", *of("size_of_negatives", "nats")])
    shares = {
        "negatives_lower": "positives whose negatives lower them",
        "lowered_by_group": "positives that their group lowers (itself, positives, negatives)",
        "lowered_but_for_negatives": "the same without the negatives",
        "lowered_by_batch": "positives that the batch lowers",
        "lowered_by_step": "positives that the step lowers, momentum included",
    }
    rows += [[text, *of(figure, "share")] for figure, text in shares.items()]
    yield from table(["", *(model.name() for model in models)], rows)
    for model in models:
        negatives = model.estimate("batches", "", "moved_negatives")
        if not negatives.is_told:
            text = "move a positive neither way on average: the interval has 0 in it"
        elif negatives.mean < 0:
            text = "lower a positive on average"
        else:
            text = "*raise* a positive on average"
        falls = [model.estimate("batches", "", figure) for figure in ("lowered_by_group", "lowered_but_for_negatives")]
        yield (
            f"With {model.name()}, a group's negatives {text} ({negatives.nats()} nats); the group lowers "
            f"{falls[0].share()} of its positives, and without its negatives {falls[1].share()}. First order leaves "
            f"{model.estimate('batches', '', 'unexplained').share()} of the squared changes unexplained."
        )
        if model.estimate("batches", "", "unexplained").mean > LARGE:
            yield (
                f"Steps are too large for first order with {model.name()}: the exact values say what a smaller step "
                "would do, and only the tables by forwards say what these do."
            )
        yield ""


def tokens(models: Sequence[Model]) -> Iterator[str]:
    """How the score ranks tokens."""
    yield "**Which tokens NTHR's rule picks**, against the exact value of each negative token:"
    yield ""
    head, rows = [""], []
    for model in models:
        head += [f"{model.name()}, plain", f"{model.name()}, Adam's metric"]
    lines = (
        ("rank_correlation", "rank correlation of score and exact value, in a group", "plain"),
        ("picked", "negative tokens picked", "share"),
        ("tokens_that_lower", "negative tokens whose penalty lowers the positives", "share"),
        ("picked_that_lower", "the same among the picked", "share"),
        ("harm_picked", "harm that the picked do", "share"),
        ("harm_of_as_many_at_random", "harm of as many at random", "share"),
        ("harm_of_as_many_at_most", "harm of as many with the highest exact value", "share"),
    )
    for figure, text, form in lines:
        cells = [
            getattr(model.estimate("batches", metric, figure), form)()
            for model in models
            for metric in ("plain", "Adam")
        ]
        rows.append([text, *cells])
    yield from table(head, rows)
    yield "*Harm* is the sum of the exact values, as a share of the sum of all that are positive."
    yield ""
    for model in models:
        values = {figure: model.estimate("batches", "Adam", figure) for figure, *_ in lines}
        yield (
            f"- With {model.name()}, in Adam's metric: the penalty of {values['tokens_that_lower'].share()} of all "
            f"negative tokens lowers the positives, and of {values['picked_that_lower'].share()} of the picked. They "
            f"do {values['harm_picked'].share()} of the harm; as many tokens could do "
            f"{values['harm_of_as_many_at_most'].share()}."
        )
    yield ""


def outcomes(models: Sequence[Model], part: str, columns: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """A table of arms for each model, with what can be told of NTHR's difference from the others."""
    for model in models:
        rows = []
        for arm in model.arms(part):
            cells = [getattr(model.estimate(part, arm, figure), form)() for figure, _, form in columns]
            difference = model.estimate(part, arm, "positive_change", less="GRPO").nats() if arm != "GRPO" else ""
            rows.append([ARMS[arm], *cells, difference])
        head = [model.name(), *(text for _, text, _ in columns), "positives' change less GRPO's"]
        yield from table(head, rows)
        for other in ("GRPO", "random"):
            yield f"- {compared(model, part, other)}"
        yield ""


def compared(model: Model, part: str, other: str) -> str:
    """NTHR against another arm, seed by seed."""
    change = model.estimate(part, "NTHR", "positive_change", less=other)
    fell = model.estimate(part, "NTHR", "positives_fell", less=other)
    words = [
        told(change, "raises positives more", "raises positives less", "positives' change", change.nats()),
        told(
            fell, "lets more positives fall", "lets fewer positives fall", "the share that falls",
            f"{100 * fell.mean:+.1f} ± {100 * fell.half:.1f} points",
        ),
    ]  # fmt: skip
    if part == "training":
        reward = model.estimate(part, "NTHR", "reward", less=other)
        words.append(told(reward, "earns more reward", "earns less reward", "the run's mean reward", reward.nats()))
    return f"NTHR against {ARMS[other]}: " + "; ".join(words) + "."


def told(difference: Estimate, above: str, below: str, name: str, shown: str) -> str:
    """What a difference says, as far as its interval lets it."""
    text = f"{name} cannot be told apart" if not difference.is_told else above if difference.mean > 0 else below
    return f"{text} ({shown})"


def summary(models: Sequence[Model]) -> Iterator[str]:
    """A line a model, of what the tables below have."""
    for model in models:
        lowered, push = (model.estimate("batches", "", name) for name in ("negatives_lower", "moved_negatives"))
        every, picked = (
            model.estimate("batches", "Adam", name).share() for name in ("tokens_that_lower", "picked_that_lower")
        )
        same = model.estimate("batches", "NTHR", "positive_change", less="GRPO")
        control = model.estimate("batches", "NTHR", "positive_change", less="random")
        fall = model.estimate("training", "NTHR", "positives_fell", less="GRPO")
        again = model.estimate("training", "NTHR", "positives_fell", less="random")
        reward = model.estimate("training", "NTHR", "reward", less="GRPO")
        falls = [f"{100 * estimate.mean:+.1f} ± {100 * estimate.half:.1f} points" for estimate in (fall, again)]
        yield (
            f"- **{model.name()}**: {lowered.share()} of the positives are lowered by their group's negatives, the "
            f"others raised; the mean is {push.nats()} nats. {picked} of the tokens that the rule picks lower "
            f"the positives, {every} of all negative tokens. On one batch, the rule moves the positives' change "
            f"by {same.nats()} nats against plain GRPO and by {control.nats()} against random tokens. In training, "
            f"the share of positives that fall changes by {falls[0]} against plain GRPO and by {falls[1]} against "
            f"random tokens, the run's mean reward by {reward.nats()} against plain GRPO."
        )
    yield ""


def section(path: Path) -> str:
    """All that stands between the marks."""
    models = read(path)
    about = "; ".join(
        f"{model.name()}: {len(model.seeds)} seeds, {model.last['steps']} steps, the word \"{model.last['word']}\", "
        f"learning rate {float(model.last['rate']):g}" for model in models
    )  # fmt: skip
    last = models[-1].last
    batches = (
        ("positives_fell", "positives that fall", "share"),
        ("positive_change", "positives' change (nats)", "nats"),
        ("negative_change", "negatives' change (nats)", "nats"),
    )
    training = (
        *batches,
        ("selected", "negative tokens down-weighted", "share"),
        ("reward_first", "reward, first 10 steps", "plain"),
        ("reward_last", "last 10", "plain"),
        ("reward", "whole run", "plain"),
    )
    lines = [
        f"Runs: {about}. Down-weighted tokens have their advantage multiplied by {float(last['factor']):g}. "
        f"Measured on {last['device']}, torch {last['torch']}, transformers {last['transformers']}. ± is half of a "
        "95% interval over seeds (Student's t).",
        "",
        *summary(models),
        *sources(models),
        *tokens(models),
        "**The same step, several ways**: from the same state of the plain run, on the same batch, each arm's next "
        "step of AdamW, by forwards before and after it.",
        "",
        *outcomes(models, "batches", batches),
        "**Training**: every arm on its own from the same seed, over all its steps. Rollouts differ "
        "after the first step.",
        "",
        *outcomes(models, "training", training),
    ]  # fmt: skip
    return "\n".join(lines)


def write(path: Path, page: Path = PAGE) -> None:
    """The section, put between its marks on the page."""
    text = page.read_text("utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{section(path)}{END}{rest.split(END)[1]}", "utf-8")
