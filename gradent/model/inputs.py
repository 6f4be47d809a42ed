"""What a trainer's forward was given beside its tokens, and whether the model is another function for it.

A pass of gradent's own has tokens alone.

Letters: N rows of L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NO_INPUTS", "FurtherInputs", "find_further_inputs", "find_noise"]

_OF_TOKENS = {"input_ids", "labels", "logits_to_keep", "num_logits_to_keep", "completion_mask", "num_items_in_batch",
              "shift_labels", "label_mask"}  # fmt: skip
"""Names of tensors that the output is cut to or that the loss takes; no activation of the rows depends on them."""

_IMAGES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id",
           "audio_token_index")  # fmt: skip
"""Where a configuration names the token that an image, a video or a sound stands at."""


@dataclass(frozen=True, eq=False)
class FurtherInputs:
    """Tensors beside tokens and mask, by name; each with the tensor that says that it changes nothing, or None."""

    harmless: Mapping[str, Tensor | None] = field(default_factory=dict)
    has_features: bool = False  # some are numbers (pixels, sound), whose first axis need not be the rows
    has_one_a_row: bool = True  # where they are, each row has exactly one
    kept: tuple[int, ...] = ()  # last positions of which alone the head's outputs are

    @property
    def names(self) -> tuple[str, ...]:
        """Those that change what the model computes, by name."""
        return tuple(sorted(name for name, flag in self.harmless.items() if flag is None or not bool(flag)))


NO_INPUTS = FurtherInputs()
"""Of a call with tokens and mask alone."""


def find_further_inputs(
    model: Any, args: Iterable[Any], kwargs: Mapping[str, Any], input_ids: Tensor, mask: Tensor
) -> FurtherInputs:
    """What a call with ids and mask `[N, L]` had beside them."""
    harmless: dict[str, Tensor | None] = {}
    features: list[Tensor] = []
    named = [*kwargs.items(), *((f"argument {number}", value) for number, value in enumerate(args) if number)]
    for name, value in named:
        if name in _OF_TOKENS or value is input_ids:
            continue
        tensors = list(_tensors(value))
        if name == "past_key_values" and value is not None:
            harmless[name] = None
        for tensor in tensors:
            harmless[name] = _is_harmless(name, tensor, mask)
            if tensor.is_floating_point() and name not in ("attention_mask", "inputs_embeds"):
                features.append(tensor)
    if not features:
        return FurtherInputs(harmless)
    one = _has_one_a_row(model, input_ids) and all(len(each) == len(input_ids) for each in features if each.dim())
    kept = [value for name in ("logits_to_keep", "num_logits_to_keep") if isinstance(value := kwargs.get(name), int)]
    return FurtherInputs(harmless, has_features=True, has_one_a_row=one, kept=tuple(kept))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _is_harmless(name: str, value: Tensor, mask: Tensor) -> Tensor | None:
    """A scalar that is true where this input is what a model takes without it; None where it never is."""
    length = mask.shape[1]
    if name == "position_ids" and value.shape[-1:] == (length,) and value.dim() in (1, 2, 3):
        counted = (mask.long().cumsum(1) - 1).to(value.device)
        return ((value == counted) | (mask == 0).to(value.device)).all()
    if name == "cache_position" and value.shape == (length,):
        return (value == torch.arange(length, device=value.device)).all()
    if name in ("token_type_ids", "mm_token_type_ids"):
        return (value == 0).all()
    is_mask = name in ("attention_mask", "argument 1") and not value.is_floating_point()
    if is_mask and value.shape == mask.shape:
        return torch.ones((), dtype=torch.bool) if name == "attention_mask" else ((value == 0) | (value == 1)).all()
    return None


def _has_one_a_row(model: Any, input_ids: Tensor) -> bool:
    """Whether each row has one run of the tokens that images stand at, all of one length, so that none has two."""
    config = getattr(model, "config", None)
    tokens = [number for name in _IMAGES if isinstance(number := getattr(config, name, None), int)]
    if not tokens:
        return False
    at = torch.isin(input_ids, torch.tensor(tokens, device=input_ids.device))
    starts = at[:, 0].long() + (at[:, 1:] & ~at[:, :-1]).sum(1)
    counts = at.sum(1)
    return bool((starts == 1).all() and (counts == counts[0]).all())


def find_noise(model: nn.Module) -> list[str]:
    """What makes a model's forward in training a random one, in words; nothing of it is left in eval mode."""
    noise: list[str] = []
    for module in model.modules():
        if not module.training:
            continue
        is_layer = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0  # noqa: SLF001
        # Attention takes its rate as a number.
        rates = (value for name, value in vars(module).items() if "drop" in name and isinstance(value, float))
        if is_layer or any(rate > 0 for rate in rates):
            noise.append("dropout")
        if vars(module).get("neftune_noise_alpha") is not None:
            noise.append("NEFTune's noise")
    return list(dict.fromkeys(noise))
