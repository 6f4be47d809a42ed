"""Which model and which pairs to load: the options that `gradent audit` and `gradent tokens` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

__all__ = ["DATA", "MODEL", "RUN", "LoadConfig", "Option"]

MODEL, DATA, RUN = "Model", "Data", "Measuring"  # panels of the help


@dataclass(frozen=True)
class Option:
    """How a field of a config is an option of the command line too; the field has its name and default."""

    help: str
    panel: str
    kind: type = str  # its type there
    flags: str = ""
    is_argument: bool = False


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Which model and which pairs to load."""

    model: Annotated[str, Option("Directory or hub id of a causal LM, or of a PEFT adapter.", MODEL, is_argument=True)]
    data: Annotated[str, Option("Preference pairs, as `gradent audit` reads them.", DATA)]
    adapter: Annotated[
        str | None, Option("PEFT adapter on MODEL; its parameters are then what is measured.", MODEL)
    ] = None
    dtype: Annotated[str, Option("float32, float64, bfloat16, float16 or auto.", MODEL)] = "float32"
    device: Annotated[str | None, Option("[default: cuda where there is one, else cpu]", MODEL)] = None
    trust_remote_code: Annotated[
        bool, Option("Run code from the model's repository.", MODEL, bool, "--trust-remote-code")
    ] = False
    split: Annotated[str, Option("Split of a dataset.", DATA)] = "train"
    max_length: Annotated[
        int | None, Option("Most tokens of prompt + response. [default: 1024, or what the model can take]", DATA, int)
    ] = None
    max_pairs: Annotated[
        int | None, Option("Measure that many pairs, drawn with --seed from slices of like length, or all.", DATA)
    ] = 256
    seed: Annotated[int, Option("Seed of that draw.", DATA, int)] = 0
    skip_bad_rows: Annotated[
        bool, Option("Go on without unusable rows; they are listed.", DATA, bool, "--skip-bad-rows")
    ] = False
    add_eos: Annotated[
        bool, Option("Append no EOS to plain strings (TRL's DPOTrainer does).", DATA, bool, "--no-add-eos")
    ] = True
