"""Quantized bases: what a configuration says of one, and quantizing while a model is loaded, as a trainer may have."""

from __future__ import annotations

from typing import Any

import torch

from gradent.errors import InputError

__all__ = ["QUANTIZATIONS", "check_quantization", "describe_quantization", "quantization_config", "widen"]

QUANTIZATIONS = ("nf4", "nf4-double", "fp4", "fp4-double", "int8", "torchao-int8")
"""Kinds of quantization that a base can be loaded in: the first five by bitsandbytes."""


def check_quantization(name: str | None, dtype: str) -> None:
    """Refuse a kind of quantization that is none of `QUANTIZATIONS`, and a dtype that it cannot take."""
    if name is None:
        return
    if name not in QUANTIZATIONS:
        raise InputError(f"quantize is {name!r}; accepted: {', '.join(QUANTIZATIONS)} (command line: --quantize).")
    if dtype == "float64":
        raise InputError(f"dtype is 'float64'; quantized layers ({name}) take float32 at most. Pass --dtype float32.")


def quantization_config(name: str, dtype: torch.dtype | None) -> Any:
    """What from_pretrained takes to quantize while it loads."""
    if name.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]  # noqa: PLC0415
        from transformers import TorchAoConfig  # noqa: PLC0415

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig  # noqa: PLC0415

    config: Any = BitsAndBytesConfig
    if name == "int8":
        return config(load_in_8bit=True)
    kind, _, double = name.partition("-")
    return config(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=bool(double),
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )  # fmt: skip


def describe_quantization(config: Any) -> str | None:
    """How the weights of a model are quantized, by its configuration; None where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    said = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method")))
    if said.get("load_in_4bit"):
        return f"{method} in 4 bit ({said.get('bnb_4bit_quant_type', 'fp4')})"
    return f"{method} in 8 bit" if said.get("load_in_8bit") else method


def widen(config: Any, dtype: torch.dtype) -> None:
    """Let 4-bit layers of a model compute in the dtype that was asked for, and not in the one of its training."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and "bnb_4bit_compute_dtype" in found:
        found["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
