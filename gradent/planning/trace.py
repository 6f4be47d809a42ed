"""What a model's trainable parameters meet in a forward pass, found out without its weights.

The model is built from its configuration out of fake tensors, which have a shape and no memory, and a short row is sent
through it under the same watch as in a measurement. So what is planned is what will be done, for every family.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradent.errors import ModelError
from gradent.hooks.capture.capture import Capture
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.picked import PickedUse
from gradent.hooks.uses.uses import GroupedUse, LookupUse, MatrixUse, SumUse, Use
from gradent.loading.adapters import read_adapter, weight_names
from gradent.loading.files import brief, hint
from gradent.loading.kinds.classes import build_model, model_class
from gradent.loading.models import LOAD_ERRORS, load_config, not_causal
from gradent.loading.source import ModelSource
from gradent.model.calls import forward_logits
from gradent.model.facts import longest_input
from gradent.model.observed import observed
from gradent.model.parameters import trainable

__all__ = ["ParameterUse", "TracedModel", "inspect_model", "watch"]

TOKENS = 16
"""Tokens of the row that is sent through: what is counted grows in step with them."""

_VALUES_NEEDED = (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError)
"""What fake tensors and the code that meets them raise where a value is asked for."""

Kind = Literal["matrix", "lookup", "sum", "explicit", "unused"]


@dataclass(frozen=True, kw_only=True)
class ParameterUse:
    """How a trainable parameter, or one expert of it, is used."""

    parameter: str
    kind: Kind  # of its gradient; "explicit" is one a row from autograd, "unused" has no part in the log-probs
    shape: tuple[int, ...]  # of one expert's matrix where the parameter holds several
    density: float = 1.0  # rows of its operand for each token of a row, all experts together
    slots: int = 1  # matrices that it holds

    @property
    def elements(self) -> int:
        """Numbers that the parameter holds."""
        return self.slots * int(torch.Size(self.shape).numel())


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """A model as far as its configuration tells."""

    name: str  # of its class
    uses: Sequence[ParameterUse]  # in the order of the parameters; a tied embedding and head is used in two ways
    parameters: int  # numbers that it holds, frozen ones included
    trainable: int  # how many of them are trained
    dtype: torch.dtype  # of the weights, as the configuration has it
    longest: int  # tokens of the longest row that it says it takes


def inspect_model(source: ModelSource, *, trust_remote_code: bool = False) -> TracedModel:
    """Build a model out of nothing, with its adapter, and watch a row pass; raises NotCausalError and ModelError."""
    config = load_config(source.base, trust_remote_code=trust_remote_code)
    given = getattr(config, "dtype", None)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = _build(source.base, config, weight_names(source.adapter), trust_remote_code)
        if source.adapter is not None:
            model = _adapt(model, source.adapter, source.base)
    try:
        with FakeTensorMode():
            _fake(model)
            uses = watch(model.eval(), torch.ones(1, TOKENS, dtype=torch.int64))
    except _VALUES_NEEDED as error:
        raise ModelError(
            f"{source.name}: what {type(model).__name__} computes hangs on the values in it ({brief(error)}), so it "
            "cannot be planned without its weights. It can be measured: gradent audit."
        ) from error
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return TracedModel(
        name=type(model).__name__,
        uses=uses,
        parameters=sum(size for size, _ in sizes),
        trainable=sum(size for size, trained in sizes if trained),
        dtype=given if isinstance(given, torch.dtype) else torch.float32,
        longest=longest_input(model),
    )


def watch(model: nn.Module, ids: Tensor) -> list[ParameterUse]:
    """The uses of a model's trainable parameters in a forward pass of ids int64 `[1, T]`, in the parameters' order."""
    parameters = trainable(model)
    capture = Capture(list(parameters.values()), Layout(1, ids.shape[1]), lambda tap, cotangent: None)
    try:
        with observed(model), torch.enable_grad(), capture:
            logits = forward_logits(model, ids)
        survey = capture.survey(logits)
        reached: dict[int, list[Use]] = defaultdict(list)
        for tap in capture.taps:
            if tap.node in survey.reached:
                reached[tap.use.view.param].append(tap.use)
        found: list[ParameterUse] = []
        for number, (name, parameter) in enumerate(parameters.items()):
            uses = reached.get(number, [])
            mixed = len({use.depth for use in uses}) > 1  # the whole of it and experts of it: slots overlap
            if number in survey.missed or mixed:
                found.append(ParameterUse(parameter=name, kind="explicit", shape=tuple(parameter.shape)))
            elif not uses:
                found.append(ParameterUse(parameter=name, kind="unused", shape=tuple(parameter.shape)))
            else:
                found.extend(_describe(name, parameter, uses, ids.shape[1]))
        return found
    finally:
        capture.close()


def _describe(name: str, parameter: Tensor, uses: Sequence[Use], tokens: int) -> list[ParameterUse]:
    """One `ParameterUse` a kind: gradients of one kind are added before they are reduced."""
    rows: dict[Kind, int] = defaultdict(int)
    shape, slots = tuple(parameter.shape), 1
    for use in uses:
        kind, count = _count(use)
        rows[kind] += count
        if kind == "matrix" and len(shape) > 2:
            shape, slots = tuple(parameter.shape[-2:]), int(parameter.shape[:-2].numel())
    return [
        ParameterUse(parameter=name, kind=kind, shape=shape, density=count / tokens, slots=slots)
        for kind, count in rows.items()
    ]


def _count(use: Use) -> tuple[Kind, int]:
    """A use's kind, and the rows of its operand."""
    if isinstance(use, MatrixUse):
        inner = use.view.shape[-2] if use.swapped else use.view.shape[-1]
        return "matrix", use.inputs.numel() // inner
    if isinstance(use, (GroupedUse, PickedUse)):
        return "matrix", use.inputs.shape[:-1].numel()
    if isinstance(use, LookupUse):
        return "lookup", use.ids.numel()
    if isinstance(use, SumUse) and use.view.ids is not None:
        return "lookup", use.view.ids.numel()
    return "sum", 0


def _build(base: str, config: Any, names: list[str], trust_remote_code: bool) -> Any:
    def build(dtype: torch.dtype) -> Any:
        return build_model(model_class(config, names), config, dtype, trust_remote_code=trust_remote_code)

    try:
        model = build(torch.float32)
        if any(parameter.dim() == 3 for parameter in model.parameters()):
            try:
                # Experts one by one would ask which of them have tokens; all at once, in bfloat16 alone, do not.
                model.set_experts_implementation("grouped_mm")
                model = build(torch.bfloat16)
                model.set_experts_implementation("grouped_mm")
            except (AttributeError, ValueError):  # no experts, or a transformers without a choice
                pass
    except LOAD_ERRORS as error:
        if "Unrecognized configuration class" in str(error):
            raise not_causal(base, config) from error
        raise ModelError(f"{base}: the model cannot be built from its config ({brief(error)}).{hint(base)}") from error
    return model


def _adapt(model: Any, adapter: str, base: str) -> Any:
    from peft import get_peft_model  # noqa: PLC0415

    try:
        config = read_adapter(adapter)
        config.inference_mode = False
        if isinstance(getattr(config, "init_lora_weights", None), str):
            config.init_lora_weights = True  # whatever they start from: there are no weights to decompose
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"{adapter}: the adapter cannot be put on {base} ({brief(error)}). Is it an adapter for this base?"
        ) from error


def _fake(model: nn.Module) -> None:
    """Replace a model's tensors, tied ones by one, by fake CPU ones, which unlike meta ones refuse to give values."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *vars(module).items()]
        for name, tensor in held:
            if isinstance(tensor, Tensor):
                if id(tensor) not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
                setattr(module, name, made[id(tensor)])
