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

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradent.record import CASE_NAMES
from gradent.record.table import Table
from gradent.theory.conditions import case_numbers

__all__ = ["mask_changes", "mask_row"]

Columns = Mapping[str, Any]

NO_TOKENS = "it needs the tokens of some pairs, and none were measured: --token-pairs (in Python, token_pairs)."
OLD_TOKENS = (
    "it needs each token's inner product with its own response, which an earlier gradent did not measure: audit again, "
    "with another --out."
)


def mask_changes(columns: Columns) -> Table:
    """First-order changes of both whole log-probs by a step on differing tokens alone, with `d_w = d_l = 1`."""
    tokens = Table.read(columns)
    pairs, which = np.unique(tokens["pair"], return_inverse=True)
    is_chosen, with_own, with_other = tokens["side"] == "chosen", tokens["own_inner"], tokens["entanglement"]
    changes = {
        "chosen_change": np.where(is_chosen, with_own, -with_other),
        "rejected_change": np.where(is_chosen, with_other, -with_own),
        "differing": np.ones(tokens.rows),  # how many tokens differ
    }
    is_left_out = tokens["identical"]
    sums = {name: np.bincount(which, weights=np.where(is_left_out, 0.0, part)) for name, part in changes.items()}
    return Table({"pair": pairs, **sums})


def mask_row(columns: Columns | None, last: Table, run: Tensor | None) -> dict[str, Any]:
    """What `what_if` says of token masking, given the last step's pairs `[P]` and their cases under the run's loss."""
    step = int(last["step"][0])
    # The two bounds on d_w/d_l speak of whole gradients, and are None.
    empty = dict.fromkeys(
        ("cases", "ratio", "needs_at_least", "needs_at_most", "share_chosen_rises", "share_rejected_falls", "within",
         "against_run")
    )  # fmt: skip
    tokens = Table.read(columns or {})
    if not tokens.rows or np.isnan(tokens["own_inner"]).any():
        reason = OLD_TOKENS if tokens.rows else NO_TOKENS
        return {"reason": reason, "pairs": 0, **empty, "ideal_by_step": [[step, None]]}
    changes = mask_changes(tokens)
    chosen, rejected = (torch.from_numpy(changes[f"{side}_change"]) for side in ("chosen", "rejected"))
    active = torch.from_numpy(changes["differing"] > 0)
    weights = active.double()  # d_w = d_l = 1, where a step is
    case = case_numbers(weights, weights, chosen >= 0, rejected <= 0)
    shares = {name: float((case == number).double().mean()) for number, name in CASE_NAMES.items()}
    against = None
    if run is not None:
        places = {pair: place for place, pair in enumerate(last["pair"].tolist())}
        before = run[[places[pair] for pair in changes["pair"].tolist()]]
        against = {"gained": int(((case == 1) & (before != 1)).sum()), "lost": int(((case != 1) & (before == 1)).sum())}
    moved = bool(active.any())
    return {
        **empty, "reason": None, "pairs": changes.rows, "cases": shares, "ratio": 1.0 if moved else None,
        "share_chosen_rises": float((chosen[active] >= 0).double().mean()) if moved else None,
        "share_rejected_falls": float((rejected[active] <= 0).double().mean()) if moved else None,
        "against_run": against, "ideal_by_step": [[step, shares["ideal"]]],
    }  # fmt: skip
