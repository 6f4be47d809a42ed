"""The class of a model: the one that was trained, which a configuration's `architectures` name.

For vision-language models transformers' AutoModelForCausalLM has no class, or another one than TRL trains, with other
names of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

__all__ = ["build_model", "model_class"]

# transformers 4 lacks some of these tables.
_TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES",
)  # fmt: skip
_CAUSAL: dict[str, Any] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_WRAPPED = re.compile(r"^base_model\.model\.")


def model_class(config: Any, names: Iterable[str] = ()) -> Any:
    """The class to load a model with: of its architectures, or of two the one that has an adapter's modules."""
    named = _of_architectures(config)
    if named is None:
        return AutoModelForCausalLM
    causal = _CAUSAL.get(str(getattr(config, "model_type", "")))
    other = None if causal in (None, named.__name__) else getattr(transformers, str(causal), None)
    names = list(names)
    if other is None or not names or _found(named, config, names) >= _found(AutoModelForCausalLM, config, names):
        return named
    return AutoModelForCausalLM


def build_model(kind: Any, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """A model of a class by its configuration alone."""
    if kind is AutoModelForCausalLM:
        factory: Any = kind
        return factory.from_config(config, dtype=dtype, **options)
    return kind._from_config(config, dtype=dtype)  # noqa: SLF001  (what from_config itself calls)


def _of_architectures(config: Any) -> Any:
    """The class that a configuration names, where transformers has it and it makes text; else None."""
    names = getattr(config, "architectures", None) or [""]
    known = {
        name for table in _TABLES for listed in getattr(modeling_auto, table, {}).values()
        for name in ([listed] if isinstance(listed, str) else listed)
    }  # fmt: skip
    kind = getattr(transformers, names[0], None) if names[0] in known else None
    is_own = kind is not None and isinstance(config, getattr(kind, "config_class", None) or ())
    return kind if is_own else None


def _found(kind: Any, config: Any, names: list[str]) -> int:
    """How many of an adapter's weights lie in modules of a class."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(kind, config, torch.float32)
    leaves = {name for name, module in model.named_modules() if next(module.children(), None) is None}
    paths = (accumulate(_WRAPPED.sub("", name).split("."), "{}.{}".format) for name in names)
    return sum(any(path in leaves for path in each) for each in paths)
