"""The ways of getting a batch's Gram entries that benchmarks/peers.py compares, each as well done as it can be.

A method is made for one model and batch and then called: it returns `[k, 3]` float64, `(‖g_w‖², ‖g_l‖², ⟨g_w, g_l⟩)`.
What wraps a model gets a copy of its own. Letters: k pairs, rows 0..k-1 chosen and k..2k-1 rejected, L padded tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peer_ghost import GhostProduct
from gradent import PairBatch, attach, measure

__all__ = ["METHODS", "WATCHED", "Method", "frozen_pass", "plain_step", "row_logps", "stack", "unpadded"]

Method = Callable[[], Tensor]
Row = tuple[Tensor, Tensor]


class Maker(Protocol):
    """Makes a method."""

    def __call__(self, model: nn.Module, batch: PairBatch) -> Method: ...


def unpadded(batch: PairBatch) -> list[Row]:
    """`(ids [T], marks [T])` of the 2k rows."""
    return [batch.row(index) for index in range(2 * len(batch))]


def stack(rows: list[Row]) -> Row:
    """Rows as `(ids [R, L], marks [R, L])`, padded on the right."""
    length = max(len(ids) for ids, _ in rows)
    ids, marks = (
        torch.stack([nn.functional.pad(part, (0, length - len(part))) for part in column])
        for column in zip(*rows, strict=True)
    )
    return ids, marks


def row_logps(model: nn.Module, ids: Tensor, marks: Tensor, **kwargs: Any) -> Tensor:
    """`log π(y|x)` of every row `[R]`, float32."""
    logits = model(input_ids=ids, use_cache=False, **kwargs).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(~marks[:, 1:], -100)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view(targets.shape).sum(1)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain_step(model: nn.Module, batch: PairBatch) -> Callable[[], Any]:
    """The unit: forward and backward of DPO's loss on the padded batch, its reference the model as it is."""
    ids, marks = stack(unpadded(batch))
    count = len(batch)
    with torch.no_grad():
        reference = row_logps(model, ids, marks)

    def step() -> None:
        for parameter in trainable(model):
            parameter.grad = None
        logps = row_logps(model, ids, marks) - reference
        (-nn.functional.logsigmoid(0.1 * (logps[:count] - logps[count:])).mean()).backward()

    return step


def two_backwards(model: nn.Module, batch: PairBatch) -> Method:
    """The paper's way done well: one backward an unpadded row, a pair's two gradients multiplied and let go of."""
    rows, parameters = unpadded(batch), trainable(model)

    def gradients(row: Row) -> tuple[Tensor, ...]:
        ids, marks = row
        return torch.autograd.grad(row_logps(model, ids[None], marks[None])[0], parameters)

    def run() -> Tensor:
        entries = torch.zeros(len(batch), 3, dtype=torch.float64)
        for pair in range(len(batch)):
            for w, l in zip(gradients(rows[pair]), gradients(rows[len(batch) + pair]), strict=True):  # noqa: E741
                entries[pair] += _dots(w, l)
        return entries

    return run


def vmap_grad(model: nn.Module, batch: PairBatch) -> Method:
    """`torch.func.vmap` over `grad` of a padded row's log-prob, every row's gradient kept."""
    ids, marks = stack(unpadded(batch))
    values = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def logp(given: dict[str, Tensor], row_ids: Tensor, row_marks: Tensor) -> Tensor:
        def call(**kwargs: Any) -> Any:
            return torch.func.functional_call(model, (given, others), (), kwargs)

        return row_logps(call, row_ids[None], row_marks[None])[0]  # type: ignore[arg-type]

    def run() -> Tensor:
        with sdpa_kernel([SDPBackend.MATH]):  # the CPU's flash attention has no batching rule
            grads = torch.func.vmap(torch.func.grad(logp), in_dims=(None, 0, 0))(values, ids, marks)
        return _pair_dots(list(grads.values()))

    return run


def _opacus(*, force_functorch: bool, positions: bool) -> Maker:
    """Opacus: per-sample gradients by hooks. `positions`: every row of the batch is given position ids of its own."""

    def make(model: nn.Module, batch: PairBatch) -> Method:
        from opacus.grad_sample import GradSampleModule  # noqa: PLC0415  (an optional peer)

        ids, marks = stack(unpadded(batch))
        kwargs = {"position_ids": torch.arange(ids.shape[1]).expand(ids.shape)} if positions else {}
        model = copy.deepcopy(model).train()  # its hooks look at models in training mode alone; there is no dropout
        wrapped = GradSampleModule(model, loss_reduction="sum", force_functorch=force_functorch)
        parameters = trainable(model)

        def run() -> Tensor:
            row_logps(wrapped, ids, marks, **kwargs).sum().backward()
            samples = [parameter.grad_sample for parameter in parameters]  # type: ignore[attr-defined]
            missing = sum(sample is None for sample in samples)
            if missing:
                raise RuntimeError(f"no per-sample gradient for {missing} of {len(samples)} parameters")
            entries = _pair_dots(samples)
            for parameter in parameters:
                parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
            return entries

        return run

    return make


def back_pack(model: nn.Module, batch: PairBatch) -> Method:
    """BackPACK's `BatchGrad`; only modules with trainable parameters are extended."""
    from backpack import backpack, extend  # noqa: PLC0415  (an optional peer)
    from backpack.extensions import BatchGrad  # noqa: PLC0415

    ids, marks = stack(unpadded(batch))
    model = copy.deepcopy(model).train()
    parameters = trainable(model)
    owners = [module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
    for module in owners:
        extend(module)

    def run() -> Tensor:
        with backpack(BatchGrad()):
            row_logps(model, ids, marks).sum().backward()
        lacking = {type(m).__name__ for m in owners if not all(hasattr(p, "grad_batch") for p in m.parameters(False))}
        if lacking:
            raise NotImplementedError(f"no extension for {', '.join(sorted(lacking))}")
        entries = _pair_dots([parameter.grad_batch for parameter in parameters])  # type: ignore[attr-defined]
        for parameter in parameters:
            parameter.grad = None
            del parameter.grad_batch
        return entries

    return run


def ghost(model: nn.Module, batch: PairBatch) -> Method:
    """A ghost product in the gram form alone, on the padded batch."""
    ids, marks = stack(unpadded(batch))
    copied = copy.deepcopy(model)

    def run() -> Tensor:
        with GhostProduct(copied, len(batch)) as product:
            positions = torch.arange(ids.shape[1]).expand(ids.shape)
            product.backward(row_logps(copied, ids, marks, position_ids=positions).sum())
        return product.entries

    return run


def gradent_measure(model: nn.Module, batch: PairBatch) -> Method:
    """`gradent.measure`."""

    def run() -> Tensor:
        gram = measure(model, batch)
        return torch.stack((gram.chosen_sq, gram.rejected_sq, gram.inner), 1)

    return run


def _watched(weight_grad: Literal["shared"] | None) -> Maker:
    """The unit, read by gradent on the way: what it takes beyond the unit is the piggyback's cost."""

    def make(model: nn.Module, batch: PairBatch) -> Method:
        step = plain_step(model, batch)

        def run() -> Tensor:
            with attach(model, mode="piggyback", weight_grad=weight_grad) as recorder:
                step()
                found = recorder.harvest()
            assert found is not None
            return torch.stack((found.gram.chosen_sq, found.gram.rejected_sq, found.gram.inner), 1)

        return run

    return make


def frozen_pass(model: nn.Module, groups: list[Row]) -> Callable[[], Any]:
    """A forward and the backward of activations alone, down to the embedding's output, parameters frozen."""

    def run() -> None:
        with _frozen(model) as outputs:
            for ids, marks in groups:
                outputs.clear()
                logps = row_logps(model, ids, marks)
                torch.autograd.grad(logps.sum(), outputs)

    return run


@contextmanager
def _frozen(model: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    parameters = trainable(model)
    handle = model.get_input_embeddings().register_forward_hook(  # type: ignore[operator, union-attr]
        lambda module, args, out: outputs.append(out.requires_grad_())
    )
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield outputs
    finally:
        handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)


def _dots(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """`[3]` float64 of two gradients of one parameter."""
    w, l = w.reshape(-1), l.reshape(-1)  # noqa: E741
    return torch.stack((w @ w, l @ l, w @ l)).double()


def _pair_dots(samples: list[Tensor]) -> Tensor:
    """`[k, 3]` of per-row gradients `[2k, ...]`."""
    count = len(samples[0]) // 2
    entries = torch.zeros(count, 3, dtype=torch.float64)
    for sample in samples:
        for pair in range(count):
            entries[pair] += _dots(sample[pair], sample[count + pair])
    return entries


warnings.filterwarnings("ignore", message="Full backward hook is firing")
warnings.filterwarnings("ignore", message=".*non-full backward hook")

METHODS: dict[str, Maker] = {
    "two backwards": two_backwards,
    "vmap(grad)": vmap_grad,
    "Opacus hooks": _opacus(force_functorch=False, positions=False),
    "Opacus functorch": _opacus(force_functorch=True, positions=False),
    "Opacus hooks, position_ids": _opacus(force_functorch=False, positions=True),
    "Opacus functorch, position_ids": _opacus(force_functorch=True, positions=True),
    "BackPACK": back_pack,
    "ghost, gram only": ghost,
    "gradent measure": gradent_measure,
}

WATCHED: dict[str, Maker] = {
    "gradent piggyback": _watched(None),
    "gradent piggyback, shared": _watched("shared"),
}
"""Those that are run inside the unit."""
