"""Which tokens of a group's rollouts pull a positive one down: `token_influence`, beside NTHR's score.

Letters: N rows of the batch, i a positive row, j another row of its group, t a token of j, T_j the tokens of j,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradent import notices
from gradent.errors import InputError, NonFiniteError
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.kernels.common.numerics import accumulator, spans
from gradent.kernels.common.precision import exactly
from gradent.model.facts import require_causal, trims
from gradent.model.head import HeadPass, forward_head
from gradent.model.observed import observed
from gradent.model.parameters import check_ids, input_device, trainable, unwrap_compiled
from gradent.model.preconditioner import metric_roots
from gradent.pairs.row_batch import RowBatch
from gradent.tokens.directions import dot, row_gradient
from gradent.tokens.tangents import Differentiator, Direction, ExpectedSum, Row

__all__ = ["TokenInfluence", "token_influence"]

Scores = dict[tuple[int, int], Tensor]
"""(i, j) -> one number for each token of j, float64 `[T_j]`."""


@dataclass(frozen=True, kw_only=True)
class TokenInfluence:
    """What the tokens of a group's rollouts do to its positive rollouts in one step, and NTHR's score of them.

    Rows are numbers of the batch's rows; tokens are the marked ones of a row, in order. All tensors are on the CPU.

    Attributes:
        group: the group's number, as in the batch.
        positives: rows of the group with a weight above 0.
        negatives: rows of the group with a weight below 0.
        influence: `{(i, j): float64 [T_j]}` for every positive i and every other row j of the group:
            `weight_j ⟨g_i, ∇log π(y_j^t)⟩`, by how many nats token t of j moves `log π(y_i)` for each unit of learning
            rate. Below 0 it pulls i down.
        nthr: `{(i, j): float64 [T_j]}` for every positive i and negative j: NTHR's score (Deng et al. 2025, "On the
            Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization"),
            `Σ_{t'} ⟨e_{y_j^t} − π_t, e_{y_i^t'} − π_t'⟩ ⟨h_t, h_t'⟩` over the tokens t' of i, with h the input of the
            output embeddings: the head's part of `⟨g_i, ∇log π(y_j^t)⟩` if the head is one untied matrix. It knows no
            weight; where it is high, NTHR holds the token to pull i down. None for a model that does not show what
            enters its head.
        correlation: Spearman's ρ of `⟨g_i, ∇log π(y_j^t)⟩` (the influence over the weight, so that both are high where
            a negative token pulls) with NTHR's score over all tokens of the negatives, each summed over the positives,
            as NTHR sums them; nan where one of the two is constant, or there is no score.
        correlations: the same for each positive alone, `{i: ρ}`.
    """

    group: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    influence: Mapping[tuple[int, int], Tensor]
    nthr: Mapping[tuple[int, int], Tensor] | None
    correlation: float
    correlations: Mapping[int, float]


def token_influence(
    model: nn.Module,
    batch: RowBatch,
    weight: Tensor,
    *,
    metric: torch.optim.Optimizer | None = None,
    memory_budget: int | str | None = None,
) -> list[TokenInfluence]:
    """What each token of a group's rollouts does to the log-prob of each positive rollout, to first order.

    Exact, by forward-mode differentiation along `g_i = ∇log π(y_i|x)` as in `token_effects`: for each positive row a
    forward and a backward, and one forward that carries tangents through each row of the group; the row's own tokens,
    which must sum to `‖g_i‖²`, check it. NTHR's score takes forwards alone. The model is left as it was, as by
    `measure`.

    Args:
        model: a causal language model, as in `measure`; in eval mode meanwhile.
        batch: N responses in groups.
        weight: `−∂L/∂log π(y_i)` of each row, `[N]`: above 0 raises the response. In GRPO the advantage over its
            normaliser; advantages alone give the same signs, in units of the normaliser.
        metric: None for plain gradient descent, or an Adam or AdamW optimizer, as in `measure`; NTHR knows none.
        memory_budget: bytes, or a string such as "512MiB": what the prediction errors of positives (tokens × V numbers
            each) may take while NTHR's score is formed. One row's are held at least, and negatives go through the model
            once for each lot that fits. 256 MiB by default.

    Returns:
        A `TokenInfluence` of each group that has a positive and a negative row, in the order of the groups' first rows;
        an empty list where there is none. Over the tokens of j, `influence[i, j]` sums to
        `weight[j] * measure_rows(model, batch, metric=metric).products[i, j]`.

    Raises:
        InputError: `batch` is no `RowBatch`, `weight` is not a finite `[N]`, a `metric` that does not fit the model, or
            token ids outside the model's vocabulary.
        ModelError: nothing trainable, not a causal language model, no logits, or reentrant gradient checkpointing.
        NonFiniteError: a nan or inf in the logits, in a gradient or in a token's influence.
        MemoryBudgetError: the budget is malformed.

    Example:
        >>> batch = RowBatch.from_tokens([([1, 2], [[3], [4, 5], [6]])])
        >>> (group,) = token_influence(model, batch, torch.tensor([1.0, -0.5, -0.5]))  # doctest: +SKIP
        >>> group.influence[0, 1].shape  # what the tokens of row 1 do to row 0  # doctest: +SKIP
        torch.Size([2])
    """
    wanted = _check_weight(batch, weight)
    budget = parse_budget(memory_budget) or DEFAULT_BUDGET
    groups = _signed_groups(batch.group.tolist(), wanted.tolist())
    if not groups:
        return []
    model = unwrap_compiled(model)
    parameters = trainable(model)
    device = input_device(model)
    rows = [batch.row(index) for index in range(len(batch))]
    check_ids(model, torch.cat([ids for ids, _ in rows]))
    rows = [(ids.to(device), marks.to(device)) for ids, marks in rows]
    names = [f"row {row} (group {number})" for row, number in enumerate(batch.group.tolist())]
    with torch.enable_grad(), observed(model):
        require_causal(model, rows[0][0])
        puller = _Puller(model, parameters, rows, names, metric)
        result = []
        for members in groups:
            positives, negatives = ([row for row in members if sign * wanted[row] > 0] for sign in (1, -1))
            pull: Scores = {}
            for i in positives:
                pull.update(puller(i, [row for row in members if row != i and wanted[row] != 0]))
                # What has no weight does nothing, and needs no pass.
                idle = {(i, row): rows[row][1] for row in members if wanted[row] == 0}
                pull.update(
                    {place: torch.zeros(int(marks.sum()), dtype=torch.float64) for place, marks in idle.items()}
                )
            nthr = nthr_scores(model, rows, names, positives, negatives, budget)
            influence = {(i, j): wanted[j] * pull[i, j] for i in positives for j in members if j != i}
            result.append(
                TokenInfluence(
                    group=int(batch.group[members[0]]), positives=tuple(positives), negatives=tuple(negatives),
                    influence=influence, nthr=nthr, correlation=_correlation(pull, nthr, positives, negatives),
                    correlations={i: _correlation(pull, nthr, [i], negatives) for i in positives},
                )
            )  # fmt: skip
    return result


def _check_weight(batch: object, weight: object) -> Tensor:
    """The weights as float64 `[N]` on the CPU."""
    if not isinstance(batch, RowBatch):
        raise InputError(
            f"token_influence: batch is a {type(batch).__name__}; accepted is a RowBatch, whose groups hold the "
            "rollouts of a prompt (RowBatch.from_tokens, RowBatch.from_text)."
        )
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (len(batch),):
        received = f"has shape {list(weight.shape)}" if isinstance(weight, Tensor) else f"is a {type(weight).__name__}"
        raise InputError(
            f"token_influence: weight {received}; accepted is a tensor [{len(batch)}], −∂L/∂log π(y_i) of each row."
        )
    wide = weight.detach().double().cpu()
    bad = (~wide.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise InputError(
            f"token_influence: weight[{row}] is {float(wide[row])}; every weight must be finite. A group whose rewards "
            "are all equal has a standard deviation of 0: give it the weight 0."
        )
    return wide


def _signed_groups(group: Sequence[int], weight: Sequence[float]) -> list[list[int]]:
    """Rows of each group that has a positive and a negative one."""
    members: dict[int, list[int]] = {}
    for row, number in enumerate(group):
        members.setdefault(number, []).append(row)
    return [
        rows for rows in members.values() if min(weight[row] for row in rows) < 0 < max(weight[row] for row in rows)
    ]


class _Puller:
    """`⟨g_i, P ∇log π(y_j^t)⟩` of the tokens of some rows j, P the metric."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        rows: Sequence[Row],
        names: Sequence[str],
        metric: torch.optim.Optimizer | None,
    ) -> None:
        self._model, self._parameters, self._rows, self._names = model, parameters, rows, names
        self._root = None if metric is None else metric_roots(metric, parameters)
        self._differentiator = Differentiator(model, parameters, caller="token_influence")

    def __call__(self, positive: int, others: Sequence[int]) -> Scores:
        """Float64 `[T_j]` for each of the other rows."""
        direction = self._direction(positive)
        found: Scores = {}
        # Two rows a forward, as of a pair, whatever the size of the group: that is what its memory is known for.
        lots = [[positive, *others][start : start + 2] for start in range(0, len(others) + 1, 2)]
        for lot in lots:
            parts = self._differentiator([self._rows[row] for row in lot], [self._names[row] for row in lot], direction)
            found.update({(positive, row): part for row, part in zip(lot, parts, strict=True) if row != positive})
            direction = Direction(direction.vector, direction.norm)  # the first lot has the row whose sum is known
        return found

    def _direction(self, row: int) -> Direction:
        """`P g_i`, along which the row's own effects sum to `⟨g_i, P g_i⟩`."""
        trim = self._differentiator.can_trim(self._rows[row][0])
        gradient, norm = row_gradient(self._model, self._parameters, self._rows[row], self._names[row], trim=trim)
        if self._root is None:
            return Direction(gradient, norm, ExpectedSum(1.0, 0.0, norm**2, norm**2))
        vector = {}
        for number, name in enumerate(self._parameters):
            if name in gradient:
                root = self._root(number)
                vector[name] = gradient[name].to(root.dtype).mul(root).mul_(root)
        long = sum(dot(vector, vector).values()) ** 0.5
        return Direction(vector, long, ExpectedSum(1.0, 0.0, sum(dot(gradient, vector).values()), norm * long))


def nthr_scores(
    model: nn.Module,
    rows: Sequence[Row],
    names: Sequence[str],
    positives: Sequence[int],
    negatives: Sequence[int],
    budget: int,
) -> Scores | None:
    """NTHR's score of the negatives' tokens for each positive, from forwards; None where the head is not to be seen."""
    trim = trims(model, rows[positives[0]][0])
    scores: Scores = {}
    waiting = list(positives)
    while waiting:
        held: list[tuple[int, Tensor, Tensor]] = []
        size = 0
        while waiting and (not held or size + _error_bytes(held[-1][2], rows[waiting[0]]) <= budget):
            row = waiting.pop(0)
            seen = forward_head(model, *rows[row], trim=trim)
            if seen is None:
                notices.warn(
                    f"gradent.token_influence: {type(model).__name__} does not show what enters its head (it needs "
                    "get_output_embeddings(), and one call of that module a forward), so there is no NTHR score. The "
                    "influence itself is exact.",
                    stacklevel=3,
                )
                return None
            held.append((row, seen.hidden, seen.errors()))
            size += held[-1][2].numel() * held[-1][2].element_size()
        for negative in negatives:
            seen = forward_head(model, *rows[negative], trim=trim)
            assert seen is not None  # it was seen for the positives
            for row, hidden, errors in held:
                scores[row, negative] = _head_products(hidden, errors, seen, max(1, budget // (4 * errors[0].nbytes)))
    for (_, negative), part in scores.items():
        if not bool(part.isfinite().all()):
            raise NonFiniteError(f"non-finite NTHR score: {names[negative]}. Try a wider dtype than the model's.")
    return scores


def _error_bytes(like: Tensor, row: Row) -> int:
    """Bytes of a row's prediction errors, from those of another row."""
    return int(row[1].sum()) * like.shape[1] * like.element_size()


@exactly
def _head_products(hidden: Tensor, errors: Tensor, other: HeadPass, step: int) -> Tensor:
    """`Σ_{t'} ⟨ε_t, ε_t'⟩ ⟨h_t, h_t'⟩` of the other row's tokens t, `step` at a time: float64 `[T]` on the CPU."""
    wide = accumulator(hidden.dtype)
    states = hidden.to(wide)
    parts = []
    for span in spans(len(other.ids), step):
        likeness = other.errors(span) @ errors.T
        parts.append((likeness.double() * (other.hidden[span].to(wide) @ states.T).double()).sum(1).cpu())
    return torch.cat(parts)


def _correlation(pull: Scores, nthr: Scores | None, positives: Sequence[int], negatives: Sequence[int]) -> float:
    """Spearman's ρ over the negatives' tokens, both summed over the positives; nan where one is constant."""
    if nthr is None:
        return float("nan")
    exact, score = (
        torch.cat([torch.stack([found[i, j] for i in positives]).sum(0) for j in negatives]) for found in (pull, nthr)
    )
    if not (float(exact.max() - exact.min()) and float(score.max() - score.min())):
        return float("nan")
    return float(torch.corrcoef(torch.stack([_ranks(exact), _ranks(score)]))[0, 1].clamp(-1, 1))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 of `[n]`, ties at their average."""
    ordered = values.sort().values
    below, through = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + through + 1).double() / 2
