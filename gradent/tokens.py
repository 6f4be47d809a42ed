"""Which tokens are entangled: `measure_tokens`.

A *token's* gradient is `∇_θ log π(y^a | x, y^{<a})`, over all parameters and through all earlier positions; what a hook
sees at position a is something else. Here each token is a row of its own: the prefix that ends with it, in which it
alone is marked.

Letters: B pairs, T_w and T_l completion tokens of chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradent.hooks.batching import group_rows
from gradent.hooks.cross import CrossLedger
from gradent.hooks.driver import announce_single_rows, measure_pairs, rows_share
from gradent.hooks.engine import MicroBatch, NeedsSingleRows, run
from gradent.kernels.plan import DEFAULT_BUDGET, parse_budget
from gradent.kernels.reference import spans
from gradent.model import check_ids, input_device, observed, plain, trainable
from gradent.pairs import PairBatch

__all__ = ["TokenGram", "measure_tokens"]

TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of the prefixes that are measured together; longer pairs are measured in blocks of the matrix."""

Row = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class TokenGram:
    """Inner products of one pair's token gradients. All tensors live on the CPU.

    Attributes:
        inner: `⟨∇log π(y_w^a), ∇log π(y_l^b)⟩`, float64 `[T_w, T_l]`; its sum is the pair's `inner`.
        chosen_sq: `‖∇log π(y_w^a)‖²`, float64 `[T_w]`.
        rejected_sq: `‖∇log π(y_l^b)‖²`, float64 `[T_l]`.
        chosen_ids: the chosen tokens, int64 `[T_w]`.
        rejected_ids: the rejected tokens, int64 `[T_l]`.
        modules: `{module name: inner of that module, [T_w, T_l]}`, summing to `inner`; None unless `by_module=True`.
    """

    inner: Tensor
    chosen_sq: Tensor
    rejected_sq: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor
    modules: Mapping[str, Tensor] | None = None

    @property
    def cosine(self) -> Tensor:
        """`inner` over the norms, float64 `[T_w, T_l]`; nan where a token has no gradient."""
        return self.inner / (self.chosen_sq[:, None] * self.rejected_sq[None]).sqrt()


def measure_tokens(
    model: nn.Module,
    batch: PairBatch,
    *,
    by_module: bool = False,
    memory_budget: int | str | None = None,
) -> list[TokenGram]:
    """Measure every inner product between a chosen and a rejected token's gradient, pair by pair.

    Exact, on every model that `measure` takes, and as leaving of it. The cost is about that of one forward and one
    backward a token.

    Args:
        model: a causal language model, as in `measure`.
        batch: B preference pairs.
        by_module: also return each module's share.
        memory_budget: bytes, or a string such as "512MiB", that the reductions' tiles may take.

    Returns:
        One `TokenGram` a pair.

    Raises:
        InputError: token ids outside the model's vocabulary.
        ModelError: nothing trainable, not a causal language model, or no logits.
        NonFiniteError: a nan or inf in the logits.
        MemoryBudgetError: the budget is malformed.

    Example:
        >>> grams = measure_tokens(model, batch)  # doctest: +SKIP
        >>> grams[0].cosine  # doctest: +SKIP
    """
    model = plain(model)
    parameters = trainable(model)
    budget = parse_budget(memory_budget)
    device = input_device(model)
    grams = []
    with torch.enable_grad(), observed(model):
        for pair in range(len(batch)):
            rows = [batch.row(row) for row in (pair, len(batch) + pair)]
            check_ids(model, torch.cat([ids for ids, _ in rows]))
            rows = [(ids.to(device), marks.to(device)) for ids, marks in rows]
            if rows_share(model, parameters) is None:  # found out, once a model, by measuring a pair of it
                measure_pairs(model, parameters, rows, budget=budget, weight=None, dropout=False)
            grams.append(_measure_pair(model, parameters, rows, pair, budget, by_module=by_module))
    return grams


def _measure_pair(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    pair: int,
    budget: int | None,
    *,
    by_module: bool,
) -> TokenGram:
    prefixes = [_prefixes(*row) for row in rows]
    names = list(parameters)
    sizes = [len(side) for side in prefixes]
    modules: dict[str, Tensor] = {name.rpartition(".")[0]: torch.zeros(*sizes, dtype=torch.float64) for name in names}
    squares = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    device = rows[0][0].device
    limit = TOKENS.get(device.type, TOKENS["cuda"]) // max(len(ids) for ids, _ in rows)
    blocks = [spans(size, max(1, limit // 2)) for size in sizes]
    for top in blocks[0]:
        for left in blocks[1]:
            tokens = [*prefixes[0][top], *prefixes[1][left]]
            entries = _cross(model, parameters, tokens, pair, budget or DEFAULT_BUDGET)
            split = top.stop - top.start
            for side, part in zip(squares, (top, left), strict=True):
                side[part] = 0.0
            for number, matrix in entries.items():
                modules[names[number].rpartition(".")[0]][top, left] += matrix[:split, split:]
                diagonal = matrix.diagonal()
                squares[0][top] += diagonal[:split]
                squares[1][left] += diagonal[split:]
    return TokenGram(
        inner=sum(modules.values(), torch.zeros(*sizes, dtype=torch.float64)),
        chosen_sq=squares[0],
        rejected_sq=squares[1],
        chosen_ids=rows[0][0][rows[0][1]].cpu(),
        rejected_ids=rows[1][0][rows[1][1]].cpu(),
        modules=modules if by_module else None,
    )


def _cross(
    model: nn.Module, parameters: Mapping[str, Tensor], tokens: Sequence[Row], pair: int, budget: int
) -> dict[int, Tensor]:
    """Parameter number -> inner products of all tokens with all, `[n, n]` float64."""
    single = [[row] for row in range(len(tokens))]
    grouped = group_rows([len(ids) for ids, _ in tokens], tokens[0][0].device)

    def measured(groups: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        micro = MicroBatch(tokens, groups, [pair] * len(tokens))
        ledger = CrossLedger(len(tokens), budget=budget)
        tensors = list(parameters.values())
        return run(model, tensors, micro, budget=budget, explicit_budget=None, ledger=ledger).entries

    try:
        return measured(grouped if rows_share(model, parameters) else single)
    except NeedsSingleRows as need:  # the model changed since it was tried
        announce_single_rows(need, list(parameters))
        return measured(single)


def _prefixes(ids: Tensor, marks: Tensor) -> list[Row]:
    """For every marked token the row that ends with it, in which it alone is marked."""
    prefixes = []
    for position in marks.nonzero()[:, 0].tolist():
        alone = torch.zeros(position + 1, dtype=torch.bool, device=ids.device)
        alone[position] = True
        prefixes.append((ids[: position + 1], alone))
    return prefixes
