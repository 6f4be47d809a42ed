"""Watching a model as a trainer runs it, for the tests of what is read off its backward."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch import Tensor, nn

from gradent.hooks.piggyback.config import WatchConfig
from gradent.hooks.piggyback.observation import BackwardObservation
from gradent.hooks.piggyback.watcher import Piggyback
from gradent.model.parameters import trainable
from gradent.pairs.batch import PairBatch
from tests.adapters import lora_everywhere
from tests.batches import left_padded, ragged
from tests.trainer_steps import through_fused_head, through_logits, with_fused_head
from tests.truth import TOLERANCE, Truth, scaled_error, truth
from tests.zoo import build

WAYS = {"fused head": through_fused_head, "logits": through_logits}
CHECKPOINTING = {"kept": None, "recomputed": False, "reentrant": True}
FUSED = 1e-6  # TRL's fused head computes log-probs in float32, whatever the model's dtype


def prepare(model: nn.Module, reentrant: bool | None = None) -> nn.Module:
    """As a trainer has it: in training mode, without dropout, with or without gradient checkpointing."""
    model.train()
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def watch(model: nn.Module, step: Callable[[], Tensor], **options: object) -> list[BackwardObservation]:
    """What piggybacking says of `step().backward()`; the model is left without a hook."""
    watcher = Piggyback(WatchConfig(model=model, parameters=trainable(model), budget=2**24, **options))  # type: ignore[arg-type]
    watcher.arm()
    step().backward()
    passed = watcher.take()
    watcher.disarm()
    assert own_hooks(model) == []
    return passed


def own_hooks(model: nn.Module) -> list[object]:
    """gradent's hooks on the model; transformers has some of its own."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())  # noqa: SLF001
    ]
    return [hook for hook in hooks if getattr(hook, "__module__", "").startswith("gradent")]


def error(passed: BackwardObservation, true: Truth) -> float:
    assert passed.unusable_reason is None and passed.no_entries_reason is None, passed
    chosen_sq, rejected_sq, inner = sum(passed.pair_entries().values()).T
    return scaled_error(SimpleNamespace(chosen_sq=chosen_sq, rejected_sq=rejected_sq, inner=inner), true)


def set_up(name: str, *, lora: bool, way: str, checkpointing: str) -> tuple[nn.Module, PairBatch, Truth, float]:
    """A model as a trainer has it, a batch, the truth, and the largest error that its arithmetic allows."""
    batch = ragged() if name == "gpt2" else left_padded(ragged())
    model = lora_everywhere(name) if lora else build(name)
    true = truth(model, batch)
    prepare(model, CHECKPOINTING[checkpointing])
    limit = TOLERANCE[true.arithmetic]
    if way == "fused head":
        with_fused_head(model)
        limit = max(limit, FUSED)
    return model, batch, true, limit
