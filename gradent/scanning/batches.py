"""The stand-ins of pairs, batch by batch, as plain numbers, so that they can be written down as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from gradent.auditing.measuring.batches import REFERENCES, check_reference, memory_errors
from gradent.errors import NonFiniteError
from gradent.loading.preferences import AuditPair, batch_of
from gradent.measurement import sequence_logps
from gradent.proxies.scores import PairProxies, measure_proxies

__all__ = ["HEAD", "SCORES", "scan_batches"]

SCORES = ("chosen_logp", "rejected_logp", "ches", "ches_normalized")
HEAD = ("chosen_sq", "rejected_sq", "inner")


def scan_batches(
    model: Any, pairs: Sequence[AuditPair], batches: Sequence[Sequence[int]], *, head: bool, adapter_off: bool,
    memory_budget: int | str | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The stand-ins of each batch, and the log-probs with the adapter off if asked for; an error names the row."""
    for positions in batches:
        chunk = [pairs[position] for position in positions]
        found = _measure(model, chunk, head=head, memory_budget=memory_budget)
        block: dict[str, Any] = {
            "positions": list(positions), "seconds": dict(found.seconds),
            **{name: getattr(found, name).tolist() for name in SCORES},
        }  # fmt: skip
        if found.head is not None:
            block |= {f"head_{name}": getattr(found.head, name).tolist() for name in HEAD}
        if adapter_off:
            began = time.perf_counter()
            with memory_errors(chunk), model.disable_adapter():
                references = sequence_logps(model, batch_of(chunk))
            check_reference(chunk, references)
            block["seconds"]["reference"] = time.perf_counter() - began
            block |= {name: values.tolist() for name, values in zip(REFERENCES, references, strict=True)}
        yield block


def _measure(model: Any, chunk: Sequence[AuditPair], *, head: bool, memory_budget: int | str | None) -> PairProxies:
    try:
        with memory_errors(chunk):
            return measure_proxies(model, batch_of(chunk), head=head, memory_budget=memory_budget)
    except NonFiniteError as error:
        if len(chunk) > 1:  # one by one, to tell which
            for pair in chunk:
                _measure(model, [pair], head=head, memory_budget=memory_budget)
        raise NonFiniteError(f"{', '.join(pair.where for pair in chunk)}: {error}") from error
