"""Which model and which pairs to load: the options that `gradent audit` and `gradent tokens` share."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

__all__ = ["DATA", "MODEL", "RUN", "LoadConfig", "Option", "option"]

MODEL, DATA, RUN = "Model", "Data", "Measuring"  # panels of the help


@dataclass(frozen=True)
class Option:
    """How a field of a config is an option of the command line too; the field has its name and default."""

    help: str
    panel: str
    kind: type = str  # its type there
    flags: str = ""
    is_argument: bool = False


def option(text: str, panel: str, kind: type = str, flags: str = "", *, default: Any = MISSING, **more: bool) -> Any:
    """A config's field that is an `Option`."""
    return field(default=default, metadata={"option": Option(text, panel, kind, flags, **more)})


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Which model and which pairs to load."""

    model: str = option("Directory or hub id of a causal LM, or of a PEFT adapter.", MODEL, is_argument=True)
    data: str = option("Preference pairs, as `gradent audit` reads them.", DATA)
    adapter: str | None = option(
        "PEFT adapter on MODEL; its parameters are then what is measured.", MODEL, default=None
    )
    quantize: str | None = option(
        "Quantize the base under adapters while it is loaded, where the run did: nf4, nf4-double, fp4, fp4-double, "
        "int8 (bitsandbytes) or torchao-int8.", MODEL, default=None,
    )  # fmt: skip
    dtype: str = option("float32, float64, bfloat16, float16 or auto.", MODEL, default="float32")
    device: str | None = option("[default: cuda where there is one, else cpu]", MODEL, default=None)
    trust_remote_code: bool = option(
        "Run code from the model's repository.", MODEL, bool, "--trust-remote-code", default=False
    )
    split: str = option("Split of a dataset.", DATA, default="train")
    max_length: int | None = option(
        "Most tokens of prompt + response. [default: the run's, or 1024, or what the model can take]", DATA, int,
        default=None,
    )  # fmt: skip
    truncation_mode: str | None = option(
        "Which end of a longer row is kept: keep_start or keep_end. [default: the run's, or keep_start]", DATA,
        default=None,
    )  # fmt: skip
    max_prompt_length: int | None = option(
        "Most tokens of a prompt, for runs of TRL up to 0.28. [default: the run's]", DATA, int, default=None
    )
    max_completion_length: int | None = option(
        "Most tokens of a response, for runs of TRL up to 0.28. [default: the run's]", DATA, int, default=None
    )
    max_pairs: int | None = option(
        "Measure that many pairs, drawn with --seed from slices of like length, or all.", DATA, default=256
    )
    seed: int = option("Seed of that draw.", DATA, int, default=0)
    skip_bad_rows: bool = option(
        "Go on without unusable rows; they are listed.", DATA, bool, "--skip-bad-rows", default=False
    )
    add_eos: bool = option(
        "Append no EOS to plain strings (TRL's DPOTrainer does).", DATA, bool, "--no-add-eos", default=True
    )
