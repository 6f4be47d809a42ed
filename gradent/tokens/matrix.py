"""Which tokens are entangled: `measure_tokens`.

A *token's* gradient is `∇_θ log π(y^a | x, y^{<a})`, over all parameters and through all earlier positions; what a hook
sees at position a is something else. Two ways lead to it: one backward pass a row that carries a gradient for every
token (`synchronized.py`), and, for models that do not allow it, token by token, where each is a row of its own: the
prefix that ends with it, in which it alone is marked.

Letters: B pairs, T_w and T_l completion tokens of chosen and rejected.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor, nn

from gradent import notices
from gradent.errors import InputError
from gradent.hooks.passes.autograd_engine import is_plain, plain_rows, run_plainly
from gradent.hooks.passes.driver import announce_single_rows, measure_groups
from gradent.hooks.passes.hooks_engine import NeedsSingleRows, run
from gradent.hooks.passes.microbatch import MicroBatch, Row, group_rows
from gradent.hooks.reduction.ledger import Ledger
from gradent.kernels.common.budget import least_budget, parse_budget
from gradent.kernels.common.numerics import spans
from gradent.kernels.common.wanted import Wanted
from gradent.model.autograd import quiet_vmap
from gradent.model.facts import computing_dtypes, facts, ignores_padding, require_causal, tolerance, trims
from gradent.model.observed import observed
from gradent.model.parameters import check_ids, input_device, trainable, unwrap_compiled
from gradent.pairs.batch import PairBatch, not_a_batch
from gradent.tokens.contractions import TokenEntries
from gradent.tokens.gram import TokenGram
from gradent.tokens.row_pass import NoSharedBackward
from gradent.tokens.synchronized import SynchronizedPasses

__all__ = ["measure_tokens"]

TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of the prefixes that are measured together where they are measured token by token."""

DEFAULT_BUDGET = 512 * 2**20
"""Scratch in bytes, where the user sets none."""

PATIENCE = 3.0
"""Seconds after which a progress bar is shown."""

Advance = Callable[[float], None]
_Sum = TypeVar("_Sum", TokenEntries, Tensor)


@dataclass(frozen=True)
class _Pair:
    """One pair's measurement."""

    model: nn.Module
    parameters: Mapping[str, Tensor]
    homes: Sequence[str]  # the module to whose entries each parameter's are added, by the parameters' numbers
    rows: Sequence[Row]
    number: int
    budget: int
    advance: Advance

    @property
    def sizes(self) -> tuple[int, int]:
        """Completion tokens of chosen and rejected."""
        chosen, rejected = (int(marks.sum()) for _, marks in self.rows)
        return chosen, rejected

    @property
    def tensors(self) -> list[Tensor]:
        """The trainable parameters by their numbers."""
        return list(self.parameters.values())

    def sum_by_home(self, parts: Iterable[tuple[int, _Sum]]) -> Iterable[tuple[str, _Sum]]:
        """The entries of a block by module, from those by parameter number, which are added up in place."""
        sums: dict[str, _Sum] = {}
        for number, entries in parts:
            home = self.homes[number]
            if home in sums:
                sums[home] += entries
            else:
                sums[home] = entries
        return sums.items()

    def blocks(self, room: int) -> list[tuple[slice, slice]]:
        """The matrix in blocks of at most `room` tokens: all of it, or `room // 2` of either side."""
        sizes = self.sizes
        steps = sizes if sum(sizes) <= room else (max(1, room // 2),) * 2
        return list(product(spans(sizes[0], steps[0]), spans(sizes[1], steps[1])))


def measure_tokens(
    model: nn.Module,
    batch: PairBatch,
    *,
    by_module: bool = False,
    memory_budget: int | str | None = None,
    progress: bool = True,
) -> list[TokenGram]:
    """Measure every inner product between a chosen and a rejected token's gradient, pair by pair.

    Exact, on every model that `measure` takes, and as leaving of it. All tokens of a pair share one backward pass that
    carries a gradient for each; where a model does not allow it, which is said once, the cost is one forward and one
    backward a token.

    Args:
        model: a causal language model, as in `measure`.
        batch: B preference pairs.
        by_module: also return each module's share.
        memory_budget: bytes, or a string such as "512MiB" (the default), that may be taken beyond the activations of
            one forward pass of each row: by each token's output gradients, by what is held of them, by tiles. A pair
            that needs more is measured in blocks of the matrix, each with a backward pass of its own; two tokens are
            the least that is taken at once, and one row's gradient of the logits. The matrix itself is not counted,
            nor its parts by module.
        progress: show a bar on a terminal where it takes more than a few seconds.

    Returns:
        One `TokenGram` a pair.

    Raises:
        InputError: `batch` is no `PairBatch`, or token ids are outside the model's vocabulary.
        ModelError: nothing trainable, not a causal language model, or no logits.
        NonFiniteError: a nan or inf in the logits.
        MemoryBudgetError: the budget is malformed.

    Example:
        >>> grams = measure_tokens(model, batch)  # doctest: +SKIP
        >>> grams[0].cosine  # doctest: +SKIP
    """
    if not isinstance(batch, PairBatch):
        raise InputError(not_a_batch("measure_tokens", batch, "PairBatch"))
    model = unwrap_compiled(model)
    parameters = trainable(model)
    budget = parse_budget(memory_budget) or DEFAULT_BUDGET
    device = input_device(model)
    homes = [name.rpartition(".")[0] if by_module else "" for name in parameters]
    grams = []
    with torch.enable_grad(), observed(model), quiet_vmap(), _bar(len(batch), shown=progress) as advance:
        for number in range(len(batch)):
            rows = [batch.row(row) for row in (number, len(batch) + number)]
            check_ids(model, torch.cat([ids for ids, _ in rows]))
            rows = [(ids.to(device), marks.to(device)) for ids, marks in rows]
            pair = _Pair(model, parameters, homes, rows, number, budget, advance)
            grams.append(_to_gram(pair, _measure_pair(pair), by_module=by_module))
    return grams


def _measure_pair(pair: _Pair, *, again: bool = False) -> dict[str, TokenEntries]:
    known = facts(pair.model)
    is_first = known.token_by_token is None
    if not known.token_by_token:
        if is_first:
            require_causal(pair.model, pair.rows[0][0], again=again)
        reason, entries = _try_together(pair, check=is_first)
        if not is_first and reason:  # the model changed since it was tried: try it as a new one
            known.token_by_token = None
            return _measure_pair(pair, again=True)
        if reason:
            notices.warn(
                f"gradent measures this model's tokens one by one (as exact, but about a forward and a backward a "
                f"token): {reason}.",
                stacklevel=5,
            )
        known.token_by_token = reason
        if not reason:
            return entries
    return _one_by_one(pair)


def _try_together(pair: _Pair, *, check: bool) -> tuple[str, dict[str, TokenEntries]]:
    """Why the tokens cannot share a backward, or the entries; with `check` their sum must be the pair's product."""
    advanced = 0.0

    def advance(share: float) -> None:
        nonlocal advanced
        advanced += share
        pair.advance(share)

    try:
        entries = _together(replace(pair, advance=advance), check=check)
    except NoSharedBackward as refusal:
        reason = str(refusal)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a backward that vmap cannot take
        reason = f"its backward pass cannot be run for many tokens at once ({' '.join(str(error).split())[:200]})"
    else:
        reason = _contradiction(pair, entries) if check else ""
        if not reason:
            return "", entries
    pair.advance(-advanced)
    return reason, {}


def _together(pair: _Pair, *, check: bool) -> dict[str, TokenEntries]:
    """The entries by module, from one backward pass a row and block."""
    can_split = all(ignores_padding(pair.model, ids) for ids, _ in pair.rows)
    trim = trims(pair.model, pair.rows[0][0])
    passes = SynchronizedPasses(
        pair.model, pair.tensors, pair.rows, can_split=can_split, trim=trim, budget=pair.budget, pair=pair.number
    )
    try:
        total: dict[str, TokenEntries] = {}
        blocks = pair.blocks(passes.block_size())
        for block in blocks:
            chosen, rejected = (range(part.start, part.stop) for part in block)
            parts = passes.run(chosen, rejected, check=check, advance=lambda part: pair.advance(part / len(blocks)))
            for home, entries in pair.sum_by_home(parts):
                total.setdefault(home, TokenEntries(pair.sizes)).put(block, entries.inner, entries.squares)
        return total
    finally:
        passes.close()


def _contradiction(pair: _Pair, entries: Mapping[str, TokenEntries]) -> str:
    """How the sum of the matrix differs from the pair's inner product, measured as a whole; empty where it agrees."""
    micro = MicroBatch.pair(pair.rows, pair.number)
    ledger = Ledger(micro.wanted, budget=pair.budget)
    if is_plain(micro.forwards, plain_rows(pair.model, pair.tensors, pair.rows[0][0].device, pair.budget)):
        outcome = run_plainly(pair.model, pair.tensors, micro, ledger)
    else:
        outcome = run(pair.model, pair.tensors, micro, ledger, explicit_budget=None)
    chosen_sq, rejected_sq, inner = torch.stack([entry.cpu() for entry in outcome.entries.values()]).sum(0)
    total = sum(float(part.inner.sum()) for part in entries.values())
    error = abs(total - float(inner)) / max(float(chosen_sq * rejected_sq) ** 0.5, 1e-300)
    if error <= tolerance("batched rows", computing_dtypes(pair.model, pair.rows[0][0].device)):
        return ""
    return f"the sum over its tokens differs from the pair's inner product by {error:.1e} (scaled)"


def _to_gram(pair: _Pair, entries: Mapping[str, TokenEntries], *, by_module: bool) -> TokenGram:
    modules: dict[str, Tensor] = {}
    total = TokenEntries(pair.sizes)
    for home in dict.fromkeys(pair.homes):
        part = entries.get(home) or TokenEntries(pair.sizes)
        modules[home] = part.inner
        total += part
    chosen_ids, rejected_ids = (ids[marks].cpu() for ids, marks in pair.rows)
    return TokenGram(
        inner=total.inner,
        chosen_sq=total.squares[0],
        rejected_sq=total.squares[1],
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        modules=modules if by_module else None,
    )


@contextmanager
def _bar(pairs: int, *, shown: bool) -> Iterator[Advance]:
    """A bar over the pairs, once it has taken `PATIENCE` seconds, on a terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda share: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = ("measuring tokens", BarColumn(), TaskProgressColumn(), "left", TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, began = bar.add_task("", total=float(pairs)), time.monotonic()

    def advance(share: float) -> None:
        bar.advance(task, share)
        if not bar.live.is_started and time.monotonic() - began > PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _one_by_one(pair: _Pair) -> dict[str, TokenEntries]:
    """The entries by module, each token measured as a row of its own."""
    chosen, rejected = (_prefixes(*row) for row in pair.rows)
    if facts(pair.model).batching is None:  # found out, once a model, by measuring a pair of it
        names, make_ledger = MicroBatch.pair(pair.rows, pair.number).names, partial(Ledger, budget=pair.budget)
        measure_groups(
            pair.model, pair.parameters, pair.rows, [[0, 1]], names, make_ledger, explicit_budget=None, dropout=False
        )
    room = TOKENS.get(pair.rows[0][0].device.type, TOKENS["cuda"]) // max(len(ids) for ids, _ in pair.rows)
    blocks = pair.blocks(room)
    total: dict[str, TokenEntries] = {}
    for block in blocks:
        top, left = block
        split = top.stop - top.start
        products = _all_products(pair, [*chosen[top], *rejected[left]])
        for home, matrix in pair.sum_by_home(products.items()):
            squares = matrix.diagonal().tensor_split([split])
            total.setdefault(home, TokenEntries(pair.sizes)).put(block, matrix[:split, split:], squares)
        pair.advance(1 / len(blocks))
    return total


def _all_products(pair: _Pair, tokens: Sequence[Row]) -> dict[int, Tensor]:
    """Parameter number -> inner products of all tokens with all, `[n, n]` float64."""
    single = [[row] for row in range(len(tokens))]
    grouped = group_rows([len(ids) for ids, _ in tokens], tokens[0][0].device)

    def measured(groups: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        wanted = Wanted.all(len(tokens))
        micro = MicroBatch(tokens, groups, wanted, [f"pair {pair.number}, a token"] * len(tokens))
        ledger = Ledger(wanted, budget=least_budget(pair.budget, len(tokens)))
        entries = run(pair.model, pair.tensors, micro, ledger, explicit_budget=None).entries
        return {number: wanted.matrix(entry.cpu()) for number, entry in entries.items()}

    batching = facts(pair.model).batching
    try:
        return measured(grouped if batching and batching.is_shared else single)
    except NeedsSingleRows as need:  # the model changed since it was tried
        announce_single_rows(need, list(pair.parameters))
        return measured(single)


def _prefixes(ids: Tensor, marks: Tensor) -> list[Row]:
    """For every marked token the row that ends with it, in which it alone is marked."""
    prefixes = []
    for position in marks.nonzero()[:, 0].tolist():
        alone = torch.zeros(position + 1, dtype=torch.bool, device=ids.device)
        alone[position] = True
        prefixes.append((ids[: position + 1], alone))
    return prefixes
