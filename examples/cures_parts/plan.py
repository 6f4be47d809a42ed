"""How much is run: settings of the generated statements, of tweets, and of a run that only shows that it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gradent.demo.settings import EMBEDDED, DemoSettings
from gradent.demo.task import STYLES

__all__ = ["GENERATED", "PRETRAINED", "SMALL", "TWEETS", "Optimizer", "Plan"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer.

    Attributes:
        name: as transformers calls it.
        label: as the page calls it.
        rate: DPO's learning rate, whose gain of the margin all other methods are given.
        masks: the grid that the masked trainer's settings are chosen from. Its threshold is not in it: all masks start
            at `mask_init`, so that the head's scores start that far above the threshold wherever it is.
        first: by method, at which multiple of `rate` the walk for its rate begins.
    """

    name: str
    label: str
    rate: float
    masks: Mapping[str, Sequence[float]]
    first: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run on one kind of data.

    Attributes:
        data: its name.
        optimizers: all of them, by label.
        sft: of the model that all methods start from; `sft.train` statements.
        steps: optimizer steps of a method.
        batch: pairs a step; every pair is trained on once.
        every: steps between two measurements.
        probe: held-out statements of a seed.
        seeds: that are reported.
        tuning_seed: that learning rates and masks are chosen on.
        styles: of the responses.
        masks_style: in which masks are chosen.
        moves: learning rates that are tried at most, for a method and style.
        longest: characters of a statement from a file, at most.
        model: what is fine-tuned.
        file: what it is; empty for generated statements.
    """

    data: str
    optimizers: Mapping[str, Optimizer]
    sft: DemoSettings
    steps: int
    batch: int
    every: int
    probe: int
    seeds: Sequence[int] = (0, 1, 2)
    tuning_seed: int = 100
    styles: Sequence[str] = tuple(STYLES)
    masks_style: str = "long suffix"
    moves: int = 9
    longest: int = 80
    model: str = "the demo's own"
    file: str = ""

    def to_record(self) -> dict[str, Any]:
        """The settings, as `cures.json` holds them.

        Returns:
            Plain data.
        """
        return asdict(self)


SGD = Optimizer(
    name="sgd", label="SGD", rate=1e-2,
    masks={"mask_eta": (0.0, 0.03, 0.1, 0.3), "mask_learning_rate": (30.0, 100.0)},
    first={"SimPO": 4.0},
)  # fmt: skip
ADAMW = Optimizer(
    name="adamw_torch", label="AdamW", rate=1e-4,
    masks={"mask_eta": (0.0, 0.01, 0.03, 0.1), "mask_learning_rate": (1e-2, 3e-2)},
)  # fmt: skip

GENERATED = Plan(
    data="generated",
    optimizers={"SGD": SGD, "AdamW": ADAMW},
    sft=EMBEDDED,
    steps=60,
    batch=16,
    every=15,
    probe=48,
)
"""The demo's model, statements, SFT, rate of SGD and steps; AdamW's rate is that of docs/demo.md."""

TWEETS = replace(
    GENERATED,
    data="tweets",
    optimizers={
        "SGD": replace(
            SGD,
            masks={"mask_eta": (0.0, 0.03, 0.1, 0.3), "mask_learning_rate": (30.0,)},
            first={"SimPO": 2.0, "pairwise": 2.0},
        ),
        "AdamW": replace(ADAMW, masks={"mask_eta": (0.0, 0.01, 0.03, 0.1), "mask_learning_rate": (3e-2,)}),
    },
    batch=8,
    every=20,
    sft=replace(EMBEDDED, train=8192, sft_lr=2e-3),
    model="of the demo's size, with the file's words",
    file="a JSON object a line",
)

PRETRAINED = replace(
    TWEETS,
    optimizers={"AdamW": replace(ADAMW, rate=2e-6)},
    sft=replace(EMBEDDED, train=4096, sft_steps=500, sft_batch=16, sft_lr=3e-4),
    steps=30,
    batch=8,
    probe=32,
)
"""For `--model`; the rate of AdamW is the demo's for a pretrained model. Run with `--small` only so far."""

SMALL = replace(
    GENERATED,
    optimizers={"SGD": replace(SGD, masks={"mask_eta": (0.1,), "mask_learning_rate": (30.0,)})},
    sft=replace(EMBEDDED, train=128, sft_steps=30),
    steps=4,
    batch=4,
    every=2,
    probe=8,
    seeds=(0,),
    styles=("single token", "long suffix"),
    moves=1,
)
