"""Models and tokenizers from directories and hub ids: safetensors only, no remote code unless asked, nothing random.

A checkpoint that lacks some of its model's weights is refused: transformers would fill the gap with random numbers,
and every figure of the audit would be about those.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from gradent.errors import InputError, ModelError, NotCausalError
from gradent.loading.adapters import put_adapter, weight_names
from gradent.loading.files import brief, hint, read_object, some
from gradent.loading.kinds.classes import model_class
from gradent.loading.kinds.quantized import check_quantization, describe_quantization, quantization_config, widen
from gradent.loading.source import ModelSource, checkpoint_above
from gradent.loading.weight_files import saved_names
from gradent.model.facts import check_causal
from gradent.model.observed import observed
from gradent.model.parameters import input_device
from gradent.notices import warn

__all__ = [
    "DTYPES", "LOAD_ERRORS", "check_device", "check_dtype", "check_vocabulary", "load_config", "load_model",
    "load_tokenizer", "not_causal",
]  # fmt: skip

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
_UNWRAP = {r"^(_orig_mod\.|module\.|base_model\.model\.)+": "", r"\._orig_mod\.": "."}  # torch.compile, DDP, PEFT
LOAD_ERRORS = (Exception,)
"""What from_pretrained raises for files that are missing, damaged, of another shape, or need another package: there is
no end to it, since a damaged config reaches any line of a model's code. Each is told with the file's place."""


def load_config(base: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a full model."""
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise ModelError(
            f"{base}: the model cannot be loaded, for there is no config.json in it. Save the whole model there "
            "(save_pretrained), or copy its config.json from where the weights come from."
        )
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise ModelError(f"{base}: the model cannot be loaded ({brief(error)}).{hint(base)}") from error
    kernel = getattr(config, "_attn_implementation", None)
    if isinstance(kernel, str) and "/" in kernel and not trust_remote_code:
        raise ModelError(
            f"{base}: its config asks for attention code from a repository ({kernel!r}), which gradent does not fetch. "
            "Remove attn_implementation from its config.json, or pass --trust-remote-code if you trust it."
        )
    if config.is_encoder_decoder:
        raise NotCausalError(
            f"{base}: {type(config).__name__} is an encoder-decoder model; gradent measures causal LMs (decoder-only: "
            "Llama, Qwen, GPT-2, Mistral, ...)."
        )
    return config


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, which may carry the run's chat template, else the base's."""
    place = source.base
    if source.adapter is not None:  # of an adapter in a folder of its name, the checkpoint above has the tokenizer
        above = checkpoint_above(source.adapter)
        kept = [str(each) for each in (source.adapter, above) if each is not None]
        place = next((each for each in kept if (Path(each) / "tokenizer_config.json").is_file()), place)
    try:
        found = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"{place}: its tokenizer cannot be loaded ({brief(error)}). Save the tokenizer into the model's directory "
            "with tokenizer.save_pretrained (of a processor: processor.tokenizer.save_pretrained)."
        ) from error
    found = getattr(found, "tokenizer", found)  # of a processor
    template = Path(place) / "chat_template.json"  # where processors of transformers 4 kept theirs
    if found.chat_template is None and template.is_file():
        found.chat_template = read_object(template).get("chat_template")
    return found


def load_model(
    source: ModelSource, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False,
    trainable: bool = True,
) -> Any:  # fmt: skip
    """The causal LM, with its adapter's parameters trainable (all parameters where there is no adapter)."""
    check_dtype(dtype)
    check_quantization(source.quantize, dtype)
    place = check_device(device)
    model = _load_base(source, dtype, place, trust_remote_code)
    if source.adapter is not None:
        model = put_adapter(model, source, trainable)
    try:
        model = (model if describe_quantization(model.config) else model.to(place)).eval()
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{source.name}: does not fit on {device}. Try --dtype bfloat16, or --device cpu.") from error
    if not trainable:
        for parameter in model.parameters():
            parameter.requires_grad = False
    elif source.adapter is None and describe_quantization(model.config):
        warn(
            f"{source.base}: its weights are quantized ({describe_quantization(model.config)}), and those have no "
            "gradient; measured are its other parameters. Give the adapter that was trained on it: --adapter DIR."
        )
    try:
        with observed(model):
            check_causal(model, torch.tensor([1, 2, 3, 4], device=input_device(model)))
    except NotCausalError as error:
        raise NotCausalError(f"{source.base}: {error}") from error
    except LOAD_ERRORS as error:
        raise ModelError(
            f"{source.base}: {type(model).__name__} does not run on a row of tokens alone ({brief(error)}). If it does "
            "where it was trained, try --device cuda; what needs more than text is measured while it is trained, by "
            "EntanglementCallback."
        ) from error
    return model


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, rows: int, source: str, used: tuple[int, str] | None = None
) -> None:
    """Refuse a tokenizer that is not this model's: ids beyond the embedding."""
    # Tokens that were added to the tokenizer alone (a pad token, mostly) are harmless while no pair uses them.
    added = set(tokenizer.added_tokens_decoder)
    largest = max((number for number in tokenizer.get_vocab().values() if number not in added), default=-1)
    if largest >= rows:
        raise ModelError(
            f"{source}: the tokenizer's vocabulary does not match the model: its ids go up to {largest}, and the "
            f"model's embedding has {rows} rows (0 to {rows - 1}). Use the tokenizer that the model was trained with."
        )
    if used is not None and used[0] >= rows:
        token = tokenizer.convert_ids_to_tokens(used[0])
        raise ModelError(
            f"{used[1]}: contains token {token!r} with id {used[0]}, and the embedding of {source} has {rows} rows "
            f"(0 to {rows - 1}). The token was added to the tokenizer but not to the model: use the model's own "
            "tokenizer, or resize the model's embeddings and train them."
        )


def _load_base(source: ModelSource, dtype: str, place: torch.device, trust_remote_code: bool) -> Any:
    base, options = source.base, dict[str, Any]()
    config = load_config(base, trust_remote_code=trust_remote_code)
    number = None if dtype == "auto" else getattr(torch, dtype)
    quantized = describe_quantization(config) or source.quantize
    if quantized is not None:
        check_quantization(source.quantize or "nf4", dtype)
        options["device_map"] = {"": place}
    wrapped = _wrapped(base)
    if wrapped:
        options["key_mapping"] = _UNWRAP
    try:
        if source.quantize is not None:
            options["quantization_config"] = quantization_config(source.quantize, number)
        elif number is not None:
            widen(config, number)
        kind = model_class(config, weight_names(source.adapter))
        loaded: Any = kind.from_pretrained(
            base, config=config, dtype=number or dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True, ignore_mismatched_sizes=True,  # they are in the report, and refused below
            **options,
        )  # fmt: skip
    except LOAD_ERRORS as error:
        if "Unrecognized configuration class" in str(error):
            raise not_causal(base, config) from error
        if quantized is not None:
            raise _not_quantized(source, quantized, error) from error
        raise ModelError(f"{base}: the model cannot be loaded ({brief(error)}).{hint(base)}") from error
    model, report = loaded
    mismatched = report["mismatched_keys"]
    other = {key: f"{key} (saved {list(saved)}, needed {list(needed)})" for key, saved, needed in mismatched}
    lacking = sorted(set(report["missing_keys"]) - set(other)) + sorted(other.values())
    if lacking:
        raise ModelError(
            f"{base}: the checkpoint lacks weights that {type(model).__name__} needs, or has them in another shape: "
            f"{some(lacking)}. They would be random numbers. Is it a classifier, an encoder or a partial checkpoint? "
            "Give a complete causal LM."
        )
    if wrapped:
        over = sorted(report["unexpected_keys"])
        if over:
            raise ModelError(
                f"{base}: names of its weights have a wrapper's prefix ({wrapped}), and without it "
                f"{type(model).__name__} has no place for {some(over)}. Save the unwrapped model again."
            )
        warn(f"{base}: names of its weights have a wrapper's prefix ({wrapped}), which is left off: the rest fits.")
    return model


def _wrapped(base: str) -> str | None:
    """The first name of a full model's weights with a wrapper's prefix; None where none has one."""
    names = saved_names(Path(base)) if Path(base).is_dir() else []
    return next((name for name in names if any(re.search(pattern, name) for pattern in _UNWRAP)), None)


def _not_quantized(source: ModelSource, how: str, error: BaseException) -> ModelError:
    """What to say of a quantized base that does not load here."""
    adapter = source.adapter or "ADAPTER"
    return ModelError(
        f"{source.base}: its weights are quantized ({how}), and do not load here ({brief(error)}). Install what it "
        "needs (pip install bitsandbytes, or torchao); or measure with the 16-bit model that it was quantized from: "
        f"of a run gradent audit RUN --base DIR, of one adapter gradent audit DIR --adapter {adapter}. Log-probs and "
        "gradients are then those of the adapter on that model, which is another function than was trained."
    )


def not_causal(base: str, config: Any) -> NotCausalError:
    """What to say of a configuration for which transformers has no causal LM."""
    return NotCausalError(
        f"{base}: transformers knows no causal LM for {type(config).__name__} (an encoder-only model?). "
        "gradent measures decoder-only models (Llama, Qwen, GPT-2, Mistral, ...)."
    )


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is none of `DTYPES`."""
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)} (command line: --dtype).")


def check_device(device: str) -> torch.device:
    """A torch device that can be used here."""
    try:
        place = torch.device(device)
        torch.empty(1, device=place).cpu()  # what cannot be read back, such as "meta", is of no use
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} cannot be used here ({brief(error)}). Try --device cpu.") from error
    return place
