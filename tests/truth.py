"""The truth that every measurement is tested against: plain autograd, one unpadded row at a time.

Nothing here is shared with gradent: rows are cut out of the batch by its masks, each has one forward and one backward
of its own, gradients are kept whole as float64 and multiplied out. Slow, and obviously right.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch

TOLERANCE: dict[str, float] = {
    "float64": 1e-9,
    "float32 islands": 1e-6,
    "float32": 5e-6,
    "bfloat16": 5e-3,  # plain autograd rounds each gradient to 8 bits, a measurement may add up wider
}
"""Largest allowed scaled error, by the arithmetic that the model's gradient passes through."""

Entries = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What `measure` must return: the fields of `PairGram` that depend on the model, float64 `[B]` each.

    Attributes:
        chosen_sq: `‖g_w‖²`.
        rejected_sq: `‖g_l‖²`.
        inner: `⟨g_w, g_l⟩`.
        chosen_logp: `log π(y_w|x)`.
        rejected_logp: `log π(y_l|x)`.
        modules: `{module name: (chosen_sq, rejected_sq, inner)}`; a shared parameter stands under its first name.
        arithmetic: "float64", "float32 islands", "float32" or "bfloat16": the narrowest type that a gradient passes.
        dead: trainable parameters whose gradient is exactly zero in every row.
    """

    chosen_sq: Tensor
    rejected_sq: Tensor
    inner: Tensor
    chosen_logp: Tensor
    rejected_logp: Tensor
    modules: Mapping[str, Entries] = field(default_factory=dict)
    arithmetic: str = "float64"
    dead: tuple[str, ...] = ()


def truth(model: nn.Module, batch: PairBatch, *, dtype: torch.dtype | None = None) -> Truth:
    """Gram entries of a batch by one plain backward a row, dropout off.

    Args:
        model: called as `model(input_ids=ids[None])`; left as it was.
        batch: any padding; only tokens under `attention_mask` are used.
        dtype: compute on a copy of the model in this dtype (float64: the truth for a float32 model); None for the
            model itself.

    Returns:
        The `Truth`.
    """
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    pairs = batch.input_ids.shape[0] // 2
    with _eval_mode(model):
        rows = [_row(model, *_trim(batch, index)) for index in range(2 * pairs)]
    names = list(rows[0].gradients)
    modules: dict[str, Entries] = {}
    for name in names:
        entry = _products([row.gradients[name] for row in rows])
        module = name.rpartition(".")[0]
        seen = modules.get(module)
        modules[module] = entry if seen is None else tuple(old + new for old, new in zip(seen, entry, strict=True))
    logps = torch.tensor([row.logp for row in rows], dtype=torch.float64)
    chosen_sq, rejected_sq, inner = (torch.stack(parts).sum(0) for parts in zip(*modules.values(), strict=True))
    return Truth(
        chosen_sq=chosen_sq,
        rejected_sq=rejected_sq,
        inner=inner,
        chosen_logp=logps[:pairs],
        rejected_logp=logps[pairs:],
        modules=modules,
        arithmetic=rows[0].arithmetic,
        dead=tuple(name for name in names if not any(bool(row.gradients[name].any()) for row in rows)),
    )


def token_gradients(model: nn.Module, ids: Tensor, marks: Tensor) -> Tensor:
    """`∇ log π(y^a | x, y^{<a})` of every marked token, `[T, P]` float64, one backward a token."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logits = call(model, ids[None])[0, -len(ids) :].double()
    rows = []
    for position in marks.nonzero()[:, 0].tolist():
        logp = logits[position - 1].log_softmax(-1)[ids[position]]
        grads = torch.autograd.grad(logp, parameters, allow_unused=True, retain_graph=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=torch.float64) if g is None else g.double().flatten()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def scaled_error(gram: PairGram | Truth, true: Truth) -> float:
    """Largest difference over entries and pairs, each divided by the true `‖g_i‖‖g_j‖`.

    Args:
        gram: what was measured.
        true: the `Truth` of the same model and batch.

    Returns:
        The error; inf where something is nan, or nonzero though the true gradient is exactly zero.
    """
    return _entries_error((gram.chosen_sq, gram.rejected_sq, gram.inner), _entries(true), true)


def module_error(gram: PairGram, true: Truth) -> float:
    """`scaled_error` of the worst module, scaled by the whole model's norms; inf where a module is missing."""
    measured = gram.modules or {}
    missing = (torch.full_like(true.inner, float("inf")),) * 3
    zero = (torch.zeros_like(true.inner),) * 3
    errors = []
    for name in {*measured, *true.modules}:
        want = true.modules.get(name, zero)
        # A module without any gradient may be listed with zeros or left out.
        absent = missing if any(part.any() for part in want) else zero
        errors.append(_entries_error(measured.get(name, absent), want, true))
    return max(errors)


def logp_error(gram: PairGram | Truth, true: Truth) -> float:
    """Largest difference of a log-prob, relative to its size where that is above one nat."""
    pairs = ((gram.chosen_logp, true.chosen_logp), (gram.rejected_logp, true.rejected_logp))
    return max(_worst((got - want).abs() / want.abs().clamp(min=1.0)) for got, want in pairs)


def assert_exact(gram: PairGram, true: Truth, batch: PairBatch, tolerance: float | None = None) -> None:
    """Fails, with the figures, unless entries, modules, log-probs, lengths and coverage are right.

    Args:
        gram: what was measured, with `by_module=True` or without.
        true: the `Truth` of the same model and batch.
        batch: what was measured on.
        tolerance: largest scaled error; by default that of the model's arithmetic in `TOLERANCE`.
    """
    limit = TOLERANCE[true.arithmetic] if tolerance is None else tolerance
    errors = {"entries": scaled_error(gram, true), "log-probs": logp_error(gram, true)}
    if gram.modules is not None:
        errors["modules"] = module_error(gram, true)
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, f"scaled errors above {limit:g} ({true.arithmetic}): {wrong}"
    completion, half = batch.completion_mask.sum(1), len(batch)
    assert gram.chosen_len.tolist() == completion[:half].tolist()
    assert gram.rejected_len.tolist() == completion[half:].tolist()
    assert gram.coverage == 1.0 and not gram.uncovered


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Fails unless the model comes out as it went in: parameters (objects and values), `.grad`, flags and hooks."""

    def tensors() -> dict[str, Tensor]:
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def state() -> tuple[object, ...]:
        parameters = model.named_parameters(remove_duplicate=False)
        return (
            {name: (id(parameter), parameter.requires_grad, parameter.grad) for name, parameter in parameters},
            {name: module.training for name, module in model.named_modules()},
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],  # noqa: SLF001
            torch.random.get_rng_state().tolist(),
        )

    values, before = {name: tensor.clone() for name, tensor in tensors().items()}, state()
    yield model
    assert state() == before, "the measurement left something behind in the model"
    assert all(torch.equal(tensor, values[name]) for name, tensor in tensors().items()), "a parameter has changed"


@dataclass(frozen=True)
class _Row:
    logp: float
    gradients: dict[str, Tensor]
    arithmetic: str


def _row(model: nn.Module, ids: Tensor, marks: Tensor) -> _Row:
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    logits = call(model, ids[None])[0, -len(ids) :]  # prompt tuning puts virtual tokens in front
    logps = logits[:-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    logp = logps[marks[1:]].sum()
    gradients = torch.autograd.grad(logp, list(trainable.values()), allow_unused=True, retain_graph=True)
    return _Row(
        logp=logp.item(),
        gradients={
            name: torch.zeros(parameter.numel(), dtype=torch.float64)
            if g is None
            else (g.to_dense() if g.is_sparse else g).double().flatten()
            for (name, parameter), g in zip(trainable.items(), gradients, strict=True)
        },
        arithmetic=_arithmetic(logits, {parameter.dtype for parameter in trainable.values()}),
    )


def call(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits `[N, L, V]` of a causal LM, without a cache where the model knows one."""
    takes = inspect.signature(model.forward).parameters
    knows_cache = "use_cache" in takes or any(name == "kwargs" and hasattr(model, "config") for name in takes)
    output = model(input_ids=input_ids, **({"use_cache": False} if knows_cache else {}))
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.logits


def _arithmetic(logits: Tensor, parameter_dtypes: set[torch.dtype]) -> str:
    """The narrowest floating type in which the graph behind `logits` hands on a gradient."""
    seen, stack, dtypes = set(), [logits.grad_fn], set(parameter_dtypes)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        dtypes |= {meta.dtype for meta in node._input_metadata}  # noqa: SLF001  (no public way to ask)
        stack.extend(following for following, _ in node.next_functions)
    if dtypes & {torch.bfloat16, torch.float16}:
        return "bfloat16"
    if torch.float32 not in dtypes:
        return "float64"
    return "float32 islands" if torch.float64 in parameter_dtypes else "float32"


def _trim(batch: PairBatch, index: int) -> tuple[Tensor, Tensor]:
    real = batch.attention_mask[index] == 1
    return batch.input_ids[index][real], batch.completion_mask[index][real] == 1


def _products(rows: list[Tensor]) -> Entries:
    half = len(rows) // 2
    chosen, rejected = torch.stack(rows[:half]), torch.stack(rows[half:])
    return (chosen * chosen).sum(1), (rejected * rejected).sum(1), (chosen * rejected).sum(1)


def _entries(true: Truth) -> Entries:
    return true.chosen_sq, true.rejected_sq, true.inner


def _entries_error(measured: Entries, expected: Entries, true: Truth) -> float:
    scales = (true.chosen_sq, true.rejected_sq, (true.chosen_sq * true.rejected_sq).sqrt())
    triples = zip(measured, expected, scales, strict=True)
    return max(_worst(_ratio((got.double().cpu() - want).abs(), scale)) for got, want, scale in triples)


def _ratio(difference: Tensor, scale: Tensor) -> Tensor:
    return torch.where(difference == 0, 0.0, difference / scale)


def _worst(errors: Tensor) -> float:
    return float(errors.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
