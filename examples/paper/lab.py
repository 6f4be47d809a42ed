"""What the commands share: where things come from and go to, and runs that several figures draw from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from examples.paper.claims import Claim
from examples.paper.draw import Row
from examples.paper.registry import NAMES, TRAINERS
from examples.paper.sentiment import SentimentStart, load_sentiment, make_sentiment, run_styles
from examples.paper.settings import Settings, shown_name
from examples.paper.starts import Start, load_start, make_start
from examples.paper.watch import run_loss
from gradent.demo.train import one_thread
from gradent.errors import InputError
from gradent.record.atomic import make_directory

__all__ = ["Lab", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        name: of the command.
        claims: the paper's statements, judged.
        image: file name in `img/` and what it shows; None where there is none.
        notes: further sentences, in Markdown.
    """

    name: str
    claims: Sequence[Claim]
    image: tuple[str, str] | None = None
    notes: Sequence[str] = ()


@dataclass
class Lab:
    """Settings, sources, and runs done so far.

    Args:
        settings: how much of everything.
        out: directory for `img/`, `data/` and `reproduction.md`.
        data: JSONL of comparisons; None for the settings'.
        tweets: JSONL of statements; None for the settings'.
        say: told what is going on.
    """

    settings: Settings
    out: Path
    data: Path | None = None
    tweets: Path | None = None
    say: Callable[[str], None] = print
    _starts: dict[tuple[int, int], Start] = field(default_factory=dict)
    _runs: dict[tuple[int, int, str], list[Row]] = field(default_factory=dict)
    _sentiments: dict[int, SentimentStart] = field(default_factory=dict)
    _styles: dict[int, dict[str, list[Row]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {"--pairs": self.data or self.settings.comparisons, "--tweets": self.tweets or self.settings.tweets}
        for option, source in given.items():
            if self.embedded and source is not None:
                raise InputError(
                    f"{option} is {source}, and with --small alone the model is the demo's, whose vocabulary is that "
                    "of the generated statements. Give a --model that knows more words, or leave the option out."
                )
        for folder in (self.out, self.out / "img", self.out / "data"):
            make_directory(folder)

    def over(self, pairs: int) -> str:
        """What a curve is, in words."""
        seeds = len(self.settings.seeds)
        band = f" and {seeds} seeds, band: least to largest seed" if seeds > 1 else ", one seed"
        return f"mean over {pairs} held-out pairs{band}"

    def image(self, name: str) -> Path:
        """The PNG of a command."""
        return self.out / "img" / f"paper-{name}.png"

    def table(self, name: str) -> Path:
        """The CSV of a command."""
        return self.out / "data" / f"paper-{name}.csv"

    def start(self, which: int, seed: int) -> Start:
        """The start of the comparisons.

        Args:
            which: 0 for Figure 2's model, 1 for Figure 5's.
            seed: of everything.

        Returns:
            The start.
        """
        which = self.settings.models.index(self.settings.models[which])  # one model for both is one start
        if (which, seed) not in self._starts:
            name = self.settings.models[which]
            self.say(f"comparisons, {shown_name(name)}, seed {seed}: loading" + ("; SFT" if self.embedded else ""))
            self._starts[which, seed] = (
                make_start(self.settings, name, seed)
                if self.embedded
                else load_start(self.settings, name, seed, self.data)
            )
        return self._starts[which, seed]

    @property
    def embedded(self) -> bool:
        """Whether the models are built here, and know the generated statements alone."""
        return self.settings.small and self.settings.sentiment_model is None

    def threads(self) -> AbstractContextManager[None]:
        """One thread of torch for the demo's models, which more would not help; as many as there are for others."""
        return one_thread() if self.embedded else nullcontext()

    def comparisons(self, which: int, losses: Sequence[str] = tuple(TRAINERS)) -> dict[str, list[Row]]:
        """Runs on the comparisons, every seed.

        Args:
            which: as in `start`.
            losses: keys of `registry.TRAINERS`.

        Returns:
            Name in the figures to rows, as of `watch.run_loss`.
        """
        which = self.settings.models.index(self.settings.models[which])
        for seed in self.settings.seeds:
            for loss in losses:
                if (which, seed, loss) not in self._runs:
                    start = self.start(which, seed)
                    self.say(f"comparisons, {start.name}, seed {seed}: {NAMES[loss]}")
                    self._runs[which, seed, loss] = run_loss(loss, start, self.settings)
        return {
            NAMES[loss]: [row for seed in self.settings.seeds for row in self._runs[which, seed, loss]]
            for loss in losses
        }

    def rates(self) -> dict[str, list[float]]:
        """Name in the figures to the learning rates of its runs on the comparisons."""
        found: dict[str, list[float]] = {}
        for (_, _, loss), rows in self._runs.items():
            found.setdefault(NAMES[loss], []).append(rows[0]["rate"])
        return found

    def sentiment(self, seed: int) -> SentimentStart:
        """The start of the sentiment task, after SFT.

        Args:
            seed: of everything.

        Returns:
            Model, tokenizer and task.
        """
        if seed not in self._sentiments:
            self.say(f"sentiment, seed {seed}: SFT")
            self._sentiments[seed] = (
                make_sentiment(self.settings, seed)
                if self.embedded
                else load_sentiment(self.settings, seed, self.tweets)
            )
        return self._sentiments[seed]

    def styles(self) -> dict[str, list[Row]]:
        """DPO on the four styles, every seed.

        Returns:
            Style to rows, as of `sentiment.run_styles`.
        """
        for seed in self.settings.seeds:
            if seed not in self._styles:
                start = self.sentiment(seed)
                self.say(f"sentiment, seed {seed}: DPO in four styles")
                self._styles[seed] = run_styles(start, self.settings, seed)
        styles = self._styles[self.settings.seeds[0]]
        return {style: [row for seed in self.settings.seeds for row in self._styles[seed][style]] for style in styles}
