"""Records of a pair's tokens from made-up gradients: any texts, any size, sums that hold as they do in real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradent.tokens.gram import match_tokens

HOSTILE = [
    "</script><img src=x onerror=alert(1)>", "<b>", "{{7*7}}", "$x$", "\u202eabc", "\x00", "\n", "\t", " ", "",
    "&amp;", "%{x}", "<br>", "\\u003c", "\ud83d", "\x1b[2J", "' onmouseover='alert(1)", '"', "屋", "שלום",
]  # fmt: skip


def token_record(chosen: Sequence[str], rejected: Sequence[str], **changes: Any) -> dict[str, Any]:
    """What `write_token_record` takes, for responses of these tokens."""
    draw = np.random.default_rng(0)
    numbers = {text: number for number, text in enumerate(dict.fromkeys([*chosen, *rejected]))}
    ids = [[numbers[text] for text in side] for side in (chosen, rejected)]
    alignment = match_tokens(*ids)
    grads = [draw.normal(size=(len(side), 30)) for side in ids]
    for a, b in alignment:
        grads[1][b] = grads[0][a] + 0.3 * draw.normal(size=30)
    inner, margin = grads[0] @ grads[1].T, grads[0].sum(0) - grads[1].sum(0)
    shared = np.zeros(len(chosen)), np.zeros(len(rejected))
    for a, b in alignment:
        shared[0][a] = shared[1][b] = 1.0
    same, other = float(shared[0] @ inner @ shared[1]), float((1 - shared[0]) @ inner @ (1 - shared[1]))
    mixed = float(inner.sum()) - same - other
    sides = {
        name: {
            "ids": numbered, "tokens": list(texts), "squares": np.square(g).sum(1).tolist(),
            "effects": (g @ margin).tolist(), "logp": -3.5, "sq": float(np.square(g.sum(0)).sum()),
        }
        for name, numbered, texts, g in zip(("chosen", "rejected"), ids, (chosen, rejected), grads, strict=True)
    }  # fmt: skip
    return {
        "model": {
            "checkpoint": "my-model", "base": "my-model", "adapter": None, "step": 0, "trainable_parameters": 10,
            "parameters": 10, "dtype": "float32", "device": "cpu",
        },
        "data": {"source": "pairs.jsonl", "split": "train", "row": 7, "rows": 9, "where": "pairs.jsonl:8"},
        "settings": {"max_length": 128},
        "prompt": {"ids": [1, 2], "text": "A prompt"},
        **sides,
        "inner": inner.tolist(),
        "alignment": [list(pair) for pair in alignment],
        "split": {
            "both_identical": same, "both_differing": other, "one_of_each": mixed,
            "aligned": sum(inner[a, b] for a, b in alignment), "identical": same + mixed / 2,
            "differing": other + mixed / 2, "identical_tokens": len(alignment),
            "differing_tokens": len(chosen) + len(rejected) - 2 * len(alignment),
        },
        "modules": None,
        "masks": None,
        "notes": [],
        "seconds": 1.0,
        **changes,
    }  # fmt: skip
