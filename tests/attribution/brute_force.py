"""The truth of a step's account: float64 autograd, every row's gradient whole, formulas written out once more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradent.pairs.batch import PairBatch
from tests.trainer_steps import Loss, through_logits

Sources = dict[str, Tensor]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One float64 vector."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


class Frozen:
    """A model and its optimizer as they are now, in float64: what every later question is answered from."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, twin: nn.Module | None = None) -> None:
        """`twin` is such a model whose forward nobody has replaced."""
        if twin is not None:
            twin.load_state_dict(model.state_dict())
        self.model = (copy.deepcopy(model) if twin is None else twin).double()
        self.names = [name for name, part in model.named_parameters() if part.requires_grad]
        tensors = dict(model.named_parameters())
        groups = {id(part): group for group in optimizer.param_groups for part in group["params"]}
        rows = [
            (tensors[name], groups[id(tensors[name])], optimizer.state.get(tensors[name], {})) for name in self.names
        ]
        self.theta = flat([part for part, _, _ in rows])
        self.is_adam = isinstance(optimizer, torch.optim.Adam)

        def spread(value: Callable[[dict[str, Any], dict[str, Any]], float]) -> Tensor:
            return torch.cat([
                torch.full((part.numel(),), float(value(group, state)), dtype=torch.float64)
                for part, group, state in rows
            ])  # fmt: skip

        def moment(key: str) -> Tensor:
            return flat([state.get(key) if state.get(key) is not None else torch.zeros_like(p) for p, _, state in rows])

        self.lr, self.decay = spread(lambda group, _: group["lr"]), spread(lambda group, _: group["weight_decay"])
        if self.is_adam:
            key = "max_exp_avg_sq" if optimizer.defaults["amsgrad"] else "exp_avg_sq"
            beta1, beta2 = (spread(lambda group, _, place=place: group["betas"][place]) for place in (0, 1))
            step, eps = spread(lambda _, state: state["step"]), spread(lambda group, _: group["eps"])
            self.moment, second = moment("exp_avg"), moment(key)
            self.metric = 1 / ((second / (1 - beta2**step)).sqrt() + eps)
            self.fresh, self.carried = (1 - beta1) / (1 - beta1 ** (step + 1)), beta1 / (1 - beta1 ** (step + 1))
        else:
            self.moment, self.metric = moment("momentum_buffer"), torch.ones_like(self.lr)
            self.fresh, self.carried = torch.ones_like(self.lr), spread(lambda group, _: group["momentum"])
        self.is_decoupled = isinstance(optimizer, torch.optim.AdamW)

    def row_gradients(self, batch: PairBatch) -> Tensor:
        """`g_i` of all rows, `[N, parameters]`."""
        parts = dict(self.model.named_parameters())
        rows = []
        for row in range(2 * len(batch)):
            ids, marks = batch.row(row)
            logits = self.model(input_ids=ids[None]).logits[0]
            logps = logits[:-1].double().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            grads = torch.autograd.grad(
                (logps * marks[1:]).sum(), [parts[name] for name in self.names], allow_unused=True
            )
            rows.append(flat([
                torch.zeros_like(parts[name]) if grad is None else grad
                for name, grad in zip(self.names, grads, strict=True)
            ]))  # fmt: skip
        return torch.stack(rows)

    def coefficients(self, batch: PairBatch, loss: Loss) -> Tensor:
        """`∂L/∂log π(y_i|x_i)` of all rows."""
        found: list[Tensor] = []

        def keep(chosen: Tensor, rejected: Tensor) -> Tensor:
            leaves = [part.detach().requires_grad_() for part in (chosen, rejected)]
            found.extend(torch.autograd.grad(loss(*leaves), leaves))
            return chosen.sum()

        through_logits(self.model, batch, keep)
        return torch.cat(found).double()

    def account(
        self, batch: PairBatch, loss: Loss, kept: float, before: Tensor | None = None
    ) -> tuple[Tensor, Sources]:
        """Products `[N, N]` and what each source does to each row, `[N]`, with `before` accumulated already."""
        grads, c = self.row_gradients(batch), self.coefficients(batch, loss)
        half = len(batch)
        metric, lr = self.metric, self.lr
        products = (grads * metric) @ grads.T
        pushes = -((grads * (lr * metric * self.fresh * kept)) @ grads.T) * c
        moved: Sources = {}
        rows = range(2 * half)
        moved["own"] = torch.stack([pushes[row, row] for row in rows])
        moved["partner"] = torch.stack([pushes[row, (row + half) % (2 * half)] for row in rows])
        for name, side in (("others_chosen", range(half)), ("others_rejected", range(half, 2 * half))):
            moved[name] = torch.stack([
                sum((pushes[row, other] for other in side if other % half != row % half), torch.zeros(()).double())
                for row in rows
            ])  # fmt: skip
        zero = torch.zeros_like(lr)
        moved["earlier_batches"] = -grads @ (lr * metric * self.fresh * kept * (zero if before is None else before))
        moved["momentum"] = -grads @ (lr * metric * self.carried * self.moment)
        shrinking = torch.ones_like(lr) if self.is_decoupled else metric * self.fresh
        moved["weight_decay"] = -grads @ (lr * shrinking * self.decay * self.theta)
        self.scale = grads.norm(dim=1)
        return products, moved
