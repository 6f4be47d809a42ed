"""Section 5.2's token masking on the tokens that an audit measured: the row of a what-if.

The mask is the one that the paper has in mind: of both responses, the tokens that tell them apart are kept (those that
the alignment of the two does not match), the others are left out. With kept gradients `k_w`, `k_l`, sums over kept
tokens, a step of DPO's form (`d_w = d_l`) moves the log-probs of the *whole* responses, to first order and per unit of
`d_w`, by

    chosen:   ⟨g_w, k_w⟩ - ⟨g_w, k_l⟩        rejected:   ⟨g_l, k_w⟩ - ⟨g_l, k_l⟩.

All four are sums over tokens of what `tokens.parquet` holds: a token's inner product with the gradient of its own whole
response (`own_inner`) and with that of the other one (`entanglement`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradent.record import CASE_NAMES
from gradent.theory.conditions import case_numbers

__all__ = ["mask_changes", "mask_row"]

Columns = Mapping[str, Sequence[Any]]

NO_TOKENS = "it needs the tokens of some pairs, and none were measured: --token-pairs (in Python, token_pairs)."
OLD_TOKENS = (
    "it needs each token's inner product with its own response, which an earlier gradent did not measure: audit again, "
    "with another --out."
)


def mask_changes(tokens: Columns) -> dict[int, tuple[float, float]]:
    """First-order changes of both whole log-probs by a step on differing tokens alone, with `d_w = d_l = 1`.

    Args:
        tokens: the columns of `record.TOKEN_COLUMNS`, `own_inner` without a None.

    Returns:
        Pair -> `(of chosen, of rejected)`; both are 0 where no token differs.
    """
    found: dict[int, tuple[float, float]] = {}
    names = ("pair", "side", "identical", "own_inner", "entanglement")
    for pair, side, identical, own, other in zip(*(tokens[name] for name in names), strict=True):
        chosen, rejected = found.get(pair, (0.0, 0.0))
        if not identical:
            chosen, rejected = (
                (chosen + own, rejected + other) if side == "chosen" else (chosen - other, rejected - own)
            )
        found[pair] = chosen, rejected
    return found


def mask_row(tokens: Columns | None, step: int, pairs: Sequence[int], run: Tensor | None) -> dict[str, Any]:
    """What `what_if` says of token masking.

    Args:
        tokens: the columns of `record.TOKEN_COLUMNS`, of some of the pairs; None without any.
        step: the last one.
        pairs: of that step, rows of the data.
        run: their cases under the run's loss, int64 `[len(pairs)]`; None where it could not be judged.

    Returns:
        The figures of a row of `what_if`. The two bounds on `d_w/d_l` speak of whole gradients, and are None.
    """
    empty = dict.fromkeys(
        ("cases", "ratio", "needs_at_least", "needs_at_most", "share_chosen_rises", "share_rejected_falls", "within",
         "against_run")
    )  # fmt: skip
    there = tokens is not None and len(tokens["pair"]) > 0
    if tokens is None or not there or None in tokens["own_inner"]:
        reason = OLD_TOKENS if there else NO_TOKENS
        return {"reason": reason, "pairs": 0, **empty, "ideal_by_step": [[step, None]]}
    changes = mask_changes(tokens)
    chosen, rejected = (torch.tensor(values, dtype=torch.float64) for values in zip(*changes.values(), strict=True))
    differing = {pair for pair, same in zip(tokens["pair"], tokens["identical"], strict=True) if not same}
    active = torch.tensor([pair in differing for pair in changes])
    weights = active.double()  # d_w = d_l = 1, where a step is
    case = case_numbers(weights, weights, chosen >= 0, rejected <= 0)
    shares = {name: float((case == number).double().mean()) for number, name in CASE_NAMES.items()}
    against = None
    if run is not None:
        place = {pair: at for at, pair in enumerate(pairs)}
        theirs = run[[place[pair] for pair in changes]]
        against = {"gained": int(((case == 1) & (theirs != 1)).sum()), "lost": int(((case != 1) & (theirs == 1)).sum())}
    moved = bool(active.any())
    return {
        **empty,
        "reason": None,
        "pairs": len(changes),
        "cases": shares,
        "ratio": 1.0 if moved else None,
        "share_chosen_rises": float((chosen[active] >= 0).double().mean()) if moved else None,
        "share_rejected_falls": float((rejected[active] <= 0).double().mean()) if moved else None,
        "against_run": against,
        "ideal_by_step": [[step, shares["ideal"]]],
    }
