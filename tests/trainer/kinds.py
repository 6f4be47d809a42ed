"""What the rows of every trainer of TRL are, by the names of their configurations: all releases that are admitted."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import trl
from transformers import TrainingArguments

KINDS = {
    "DPOConfig": "pairs", "CPOConfig": "pairs", "ORPOConfig": "pairs", "TPOConfig": "pairs", "RewardConfig": "pairs",
    "OnlineDPOConfig": "pairs",
    "GRPOConfig": "groups", "RLOOConfig": "groups", "GMPOConfig": "groups", "GFPOConfig": "groups",
    "GRPOWithReplayBufferConfig": "groups", "DPPOConfig": "groups", "XPOConfig": "groups",
    "KTOConfig": "batch", "BCOConfig": "batch", "A2POConfig": "batch", "NashMDConfig": "batch",
    "SFTConfig": "refusal", "SSDConfig": "refusal", "PRMConfig": "refusal",
    "PPOConfig": "refusal", "AsyncGRPOConfig": "refusal",
    "GKDConfig": "refusal", "GOLDConfig": "refusal", "DistillationConfig": "refusal", "SDFTConfig": "refusal",
    "AsyncDistillationConfig": "refusal", "ServerDistillationConfig": "refusal", "SDPOConfig": "refusal",
    "IWOPDConfig": "refusal", "MiniLLMConfig": "refusal", "PAPOConfig": "groups",
    "OnPolicyConfig": "no trainer", "BaseConfig": "no trainer",
}  # fmt: skip
"""`pairs`; `groups` of a prompt's rows; `batch`, rows of which all of a batch are one group; `refusal`."""


def configurations() -> dict[str, type]:
    """Every configuration of a trainer in the installed TRL, by name."""
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages(trl.__path__, "trl.", onerror=lambda _: None):
        if module.name.rpartition(".")[2].endswith("config") or module.name == "trl.trainer.utils":
            values = vars(importlib.import_module(module.name)).values()
            found |= {value.__name__: value for value in values if _is(value)}
    return found


def _is(value: Any) -> bool:
    is_config = isinstance(value, type) and issubclass(value, TrainingArguments) and value.__module__.startswith("trl.")
    return is_config and not value.__name__.startswith("_")
