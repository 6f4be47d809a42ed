"""A fixed, held-out set of pairs, measured again and again along a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradent.errors import InputError
from gradent.measurement import measure
from gradent.pairs.batch import PairBatch, tokenize_pair
from gradent.theory.conditions import Verdict

__all__ = ["Probe"]


class Probe:
    """Pairs to measure every so many steps.

    Args:
        data: a `PairBatch`, or rows with prompt, chosen and rejected in one of TRL's formats.
        every: steps between two measurements.

    Raises:
        InputError: data of another kind, or no row.
    """

    def __init__(self, data: PairBatch | Sequence[Mapping[str, Any]] | Any, *, every: int) -> None:
        self.every = every
        self._batch = data if isinstance(data, PairBatch) else None
        self._rows = [] if isinstance(data, PairBatch) else _rows(data)

    def prepare(self, tokenizer: Any, args: Any) -> None:
        """Tokenize as the trainer does.

        Args:
            tokenizer: the trainer's tokenizer.
            args: the trainer's arguments; `max_length` is read off them.

        Raises:
            InputError: rows of text, and a trainer without a tokenizer.
            PairError: an unusable row.
        """
        if self._batch is not None:
            return
        if tokenizer is None:
            raise InputError("probe_data holds text, and the trainer has no tokenizer (processing_class). Pass one.")
        limit = getattr(args, "max_length", None)
        tokens = []
        for number, row in enumerate(self._rows):
            prompt, chosen, rejected = _split(row)
            eos = isinstance(chosen, str) and tokenizer.eos_token is not None
            tokens.append(
                tokenize_pair(
                    tokenizer, prompt, chosen, rejected, max_length=limit, add_eos=eos, where=f"probe_data[{number}]"
                )
            )
        self._batch = PairBatch.from_tokens(tokens)

    def due(self, step: int) -> bool:
        """Whether a measurement is due after a step."""
        return self._batch is not None and (step == 1 or step % self.every == 0)

    def measure(self, model: nn.Module, budget: int | str | None) -> dict[str, float]:
        """Measure the probe.

        Args:
            model: the model in training.
            budget: as `memory_budget` of `measure`.

        Returns:
            `gradent/probe/...` scalars; cases and needs for weights `d_w = d_l`, as every loss has that sees the two
            log-probs' difference alone (DPO, IPO, hinge).
        """
        assert self._batch is not None
        gram = measure(model, self._batch, memory_budget=budget)
        ones = torch.ones_like(gram.inner)
        judged = Verdict.from_weights(gram, ones, ones)
        values = {
            "inner": gram.inner,
            "cosine": gram.cosine,
            "chosen_norm": gram.chosen_sq.sqrt(),
            "rejected_norm": gram.rejected_sq.sqrt(),
            "chosen_logp": gram.chosen_logp,
            "rejected_logp": gram.rejected_logp,
        }
        scalars = {f"gradent/probe/{name}": float(value[value.isfinite()].mean()) for name, value in values.items()}
        shares = judged.fractions()
        names = ("ideal", "both_down", "both_up", "reversed")
        return scalars | {f"gradent/probe/case/{name}": shares[name] for name in names}


def _rows(data: Any) -> list[Mapping[str, Any]]:
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


def _split(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    from trl.data_utils import maybe_extract_prompt  # noqa: PLC0415  (TRL is an extra)

    whole = maybe_extract_prompt({key: row[key] for key in ("prompt", "chosen", "rejected") if key in row})
    return whole["prompt"], whole["chosen"], whole["rejected"]
