"""Which tokens are entangled: `measure_tokens`.

A *token's* gradient is `∇_θ log π(y^a | x, y^{<a})`, over all parameters and through all earlier positions; what a hook
sees at position a is something else. Two ways lead to it: in step (`gradent/hooks/lockstep.py`), where each token has a
cotangent of its own in one backward pass, and, for models that do not allow it, token by token, where each is a row of
its own: the prefix that ends with it, in which it alone is marked.

Letters: B pairs, T_w and T_l completion tokens of chosen and rejected.
"""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradent.errors import GradentWarning
from gradent.hooks.batching import group_rows
from gradent.hooks.cross import CrossLedger
from gradent.hooks.driver import announce_single_rows, measure_pairs, rows_share
from gradent.hooks.engine import MicroBatch, NeedsSingleRows, run
from gradent.hooks.lockstep import Lockstep
from gradent.hooks.strand import NoLockstep
from gradent.kernels.plan import parse_budget
from gradent.kernels.reference import spans
from gradent.kernels.tokens import Entries
from gradent.model import check_causal, check_ids, ignores_padding, input_device, observed, plain, trainable
from gradent.pairs import PairBatch
from gradent.token_gram import TokenGram

__all__ = ["measure_tokens"]

TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of the prefixes that are measured together where they are measured token by token."""

DEFAULT_BUDGET = 512 * 2**20
"""Scratch in bytes, where the user sets none."""

PATIENCE = 3.0
"""Seconds after which a progress bar is shown."""

# Models whose tokens cannot share a backward pass, with the reason, and those for which it was tried and agreed.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], str]] = weakref.WeakKeyDictionary()

# Scaled difference between the matrix's sum and the pair's inner product beyond which the two are not the same.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-4}
_AGREEMENT_NARROW = 0.2

Row = tuple[Tensor, Tensor]
Advance = Callable[[float], None]


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
    carries a cotangent for each; where a model does not allow it, which is said once, the cost is one forward and one
    backward a token.

    Args:
        model: a causal language model, as in `measure`.
        batch: B preference pairs.
        by_module: also return each module's share.
        memory_budget: bytes, or a string such as "512MiB" (the default), that may be taken beyond the activations of
            one forward pass of each row: by each token's cotangents, by what is held of them, by tiles. A pair that
            needs more is measured in blocks of the matrix, each with a backward pass of its own; two tokens are the
            least that is taken at once.
        progress: show a bar on a terminal where it takes more than a few seconds.

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
    budget = parse_budget(memory_budget) or DEFAULT_BUDGET
    device = input_device(model)
    grams = []
    with torch.enable_grad(), observed(model), _no_advice(), _bar(len(batch), shown=progress) as advance:
        for pair in range(len(batch)):
            rows = [batch.row(row) for row in (pair, len(batch) + pair)]
            check_ids(model, torch.cat([ids for ids, _ in rows]))
            rows = [(ids.to(device), marks.to(device)) for ids, marks in rows]
            entries = _measure_pair(model, parameters, rows, pair, budget, advance)
            grams.append(_to_gram(rows, list(parameters), entries, by_module=by_module))
    return grams


def _measure_pair(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    pair: int,
    budget: int,
    advance: Advance,
) -> dict[int, Entries]:
    known, key = _KNOWN.setdefault(model, {}), tuple(parameters)
    if key not in known:
        check_causal(model, rows[0][0])
        reason, entries = _try_in_step(model, parameters, rows, pair, budget, advance, first=True)
        if reason:
            warnings.warn(
                f"gradent measures this model's tokens one by one (as exact, but about a forward and a backward a "
                f"token): {reason}.",
                GradentWarning,
                stacklevel=4,
            )
        known[key] = reason
        if entries is not None:
            return entries
    elif not known[key]:
        reason, entries = _try_in_step(model, parameters, rows, pair, budget, advance, first=False)
        if entries is not None:
            return entries
        del known[key]  # the model changed since it was tried: try it as a new one
        return _measure_pair(model, parameters, rows, pair, budget, advance)
    return _one_by_one(model, parameters, rows, pair, budget, advance)


def _try_in_step(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    pair: int,
    budget: int,
    advance: Advance,
    *,
    first: bool,
) -> tuple[str, dict[int, Entries] | None]:
    """Why it cannot be done, or the entries. The first pair of a model is also measured as a whole, and must agree."""
    told = 0.0

    def tell(share: float) -> None:
        nonlocal told
        told += share
        advance(share)

    try:
        entries = _in_step(model, parameters, rows, pair, budget, tell, check=first)
    except NoLockstep as no:
        reason = str(no)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a backward that vmap cannot take
        reason = f"its backward pass cannot be run for many tokens at once ({' '.join(str(error).split())[:200]})"
    else:
        reason = _disagreement(model, parameters, rows, entries, budget) if first else ""
        if not reason:
            return "", entries
    advance(-told)
    return reason, None


def _in_step(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    pair: int,
    budget: int,
    advance: Advance,
    *,
    check: bool,
) -> dict[int, Entries]:
    sizes = (int(rows[0][1].sum()), int(rows[1][1].sum()))
    whole = not all(ignores_padding(model, ids) for ids, _ in rows)
    lockstep = Lockstep(model, list(parameters.values()), rows, whole=whole, budget=budget, pair=pair)
    try:
        room = lockstep.block_size()
        blocks = [[range(size)] for size in sizes]
        if room < sum(sizes):
            blocks = [[range(part.start, part.stop) for part in spans(size, max(1, room // 2))] for size in sizes]
        total: dict[int, Entries] = {}
        share = 1 / (len(blocks[0]) * len(blocks[1]))
        for chosen in blocks[0]:
            for rejected in blocks[1]:
                found = lockstep.run(chosen, rejected, check=check, advance=lambda part: advance(part * share))
                for number, part in found.items():
                    mine = total.setdefault(number, Entries(sizes))
                    mine.inner[chosen.start : chosen.stop, rejected.start : rejected.stop] = part.inner
                    mine.squares[0][chosen.start : chosen.stop] = part.squares[0]
                    mine.squares[1][rejected.start : rejected.stop] = part.squares[1]
        return total
    finally:
        lockstep.close()


def _disagreement(
    model: nn.Module, parameters: Mapping[str, Tensor], rows: Sequence[Row], entries: Mapping[int, Entries], budget: int
) -> str:
    """What is wrong with the sum of a matrix, which is the pair's inner product; empty where nothing is."""
    micro = MicroBatch(rows, [[0], [1]], [0])
    outcome = run(model, list(parameters.values()), micro, budget=budget, explicit_budget=None)
    chosen_sq, rejected_sq, inner = torch.stack([entry.cpu()[0] for entry in outcome.entries.values()]).sum(0)
    total = sum(float(part.inner.sum()) for part in entries.values())
    error = abs(total - float(inner)) / max(float(chosen_sq * rejected_sq) ** 0.5, 1e-300)
    limit = max(_AGREEMENT.get(parameter.dtype, _AGREEMENT_NARROW) for parameter in model.parameters())
    return (
        ""
        if error <= limit
        else f"the sum over its tokens differs from the pair's inner product by {error:.1e} (scaled)"
    )


def _to_gram(
    rows: Sequence[Row], names: Sequence[str], entries: Mapping[int, Entries], *, by_module: bool
) -> TokenGram:
    sizes = (int(rows[0][1].sum()), int(rows[1][1].sum()))
    modules: dict[str, Tensor] = {name.rpartition(".")[0]: torch.zeros(*sizes, dtype=torch.float64) for name in names}
    total = Entries(sizes)
    for number, part in sorted(entries.items()):
        modules[names[number].rpartition(".")[0]] += part.inner
        total += part
    return TokenGram(
        inner=total.inner,
        chosen_sq=total.squares[0],
        rejected_sq=total.squares[1],
        chosen_ids=rows[0][0][rows[0][1]].cpu(),
        rejected_ids=rows[1][0][rows[1][1]].cpu(),
        modules=modules if by_module else None,
    )


@contextmanager
def _no_advice() -> Iterator[None]:
    """Without torch's advice to its own makers where an operator takes lanes one after the other."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "There is a performance drop because we have not yet implemented the batching"
        )
        yield


@contextmanager
def _bar(pairs: int, *, shown: bool) -> Iterator[Advance]:
    """A bar over the pairs, once it has taken `PATIENCE` seconds, on a terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda share: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (
        TextColumn("measuring tokens"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
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


def _one_by_one(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    pair: int,
    budget: int,
    advance: Advance,
) -> dict[int, Entries]:
    """Each token as a row of its own."""
    prefixes = [_prefixes(*row) for row in rows]
    sizes = (len(prefixes[0]), len(prefixes[1]))
    if rows_share(model, parameters) is None:  # found out, once a model, by measuring a pair of it
        measure_pairs(model, parameters, rows, budget=budget, weight=None, dropout=False)
    limit = TOKENS.get(rows[0][0].device.type, TOKENS["cuda"]) // max(len(ids) for ids, _ in rows)
    blocks = [spans(size, max(1, limit // 2)) for size in sizes]
    total: dict[int, Entries] = {}
    for top in blocks[0]:
        for left in blocks[1]:
            tokens = [*prefixes[0][top], *prefixes[1][left]]
            split = top.stop - top.start
            for number, matrix in _cross(model, parameters, tokens, pair, budget).items():
                mine, diagonal = total.setdefault(number, Entries(sizes)), matrix.diagonal()
                mine.inner[top, left] = matrix[:split, split:]
                mine.squares[0][top] = diagonal[:split]
                mine.squares[1][left] = diagonal[split:]
            advance(1 / (len(blocks[0]) * len(blocks[1])))
    return total


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
