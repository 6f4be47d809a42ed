"""A fixed, held-out set of pairs, measured again and again along a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradent.errors import DataFileError, InputError
from gradent.measurement import measure
from gradent.pairs.batch import PairBatch
from gradent.pairs.preparation import KEEP_START, Preparation
from gradent.theory.conditions import Verdict
from gradent.trainer.records.step import case_shares, finite_means, gram_values

__all__ = ["Probe"]

logger = logging.getLogger(__name__)


class Probe:
    """Pairs to measure every so many steps: a `PairBatch`, or rows in one of TRL's preference formats."""

    def __init__(self, data: PairBatch | Sequence[Mapping[str, Any]] | Any, *, every: int) -> None:
        self.every = every
        self._batch = data if isinstance(data, PairBatch) else None
        self._rows = [] if isinstance(data, PairBatch) else _check_rows(data)

    def prepare(self, tokenizer: Any, args: Any) -> None:
        """Tokenize the rows as the trainer with these arguments does."""
        if self._batch is not None:
            return
        if tokenizer is None:
            raise InputError("probe_data holds text, and the trainer has no tokenizer (processing_class). Pass one.")
        import trl  # noqa: PLC0415  (an extra)

        from gradent.loading.preference_files import Row  # noqa: PLC0415
        from gradent.loading.preferences import batch_of, prepare_pairs  # noqa: PLC0415

        tokenizer = getattr(tokenizer, "tokenizer", tokenizer) or tokenizer  # of a processor
        how = Preparation.of_release(
            trl.__version__, max_length=getattr(args, "max_length", None), add_eos=tokenizer.eos_token is not None,
            truncation_mode=getattr(args, "truncation_mode", KEEP_START),
            max_prompt_length=getattr(args, "max_prompt_length", None),
            max_completion_length=getattr(args, "max_completion_length", None),
        )  # fmt: skip
        rows = [Row(index=number, where=f"probe_data[{number}]", values=row) for number, row in enumerate(self._rows)]
        try:
            found = prepare_pairs(rows, tokenizer, how, skip_bad_rows=True)
        except DataFileError as error:
            raise InputError(f"probe_data holds no pair to measure. {error}") from error
        if found.skipped:
            logger.warning(
                "gradent: %d of %d pairs of probe_data are left out. %s",
                len(found.skipped), len(rows), found.skipped[0].reason,
            )  # fmt: skip
        self._batch = batch_of(found.pairs)

    @property
    def batch(self) -> PairBatch:
        """The pairs, once they are tokens."""
        assert self._batch is not None
        return self._batch

    def is_due(self, step: int) -> bool:
        """Whether a measurement is due after a step."""
        return self._batch is not None and (step == 1 or step % self.every == 0)

    def measure(self, model: nn.Module, budget: int | str | None) -> dict[str, float]:
        """The `gradent/probe/...` scalars of the model as it is now."""
        gram = measure(model, self.batch, memory_budget=budget)
        ones = torch.ones_like(gram.inner)  # as in every loss that sees only the two log-probs' difference
        values = gram_values(gram) | {"chosen_logp": gram.chosen_logp, "rejected_logp": gram.rejected_logp}
        cases = case_shares(Verdict.from_weights(gram, ones, ones).case, "gradent/probe/case/")
        return finite_means(values, "gradent/probe/") | cases


def _check_rows(data: Any) -> list[Mapping[str, Any]]:
    try:
        rows = list(data)
    except TypeError as error:
        raise InputError(
            f"probe_data is a {type(data).__name__}; accepted is a PairBatch, or rows (a dataset, a list of dicts) "
            "with prompt, chosen and rejected."
        ) from error
    if not rows:
        raise InputError("probe_data holds no row; at least one pair is needed.")
    for number, row in enumerate(rows):
        missing = [key for key in ("chosen", "rejected") if not isinstance(row, Mapping) or key not in row]
        if missing:
            raise InputError(f"probe_data[{number}]: missing {' and '.join(map(repr, missing))}.")
    return rows
