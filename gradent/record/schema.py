"""The parquet tables that runs leave behind, each with the schema version in its metadata.

`pairs.parquet` and `steps.parquet` have a row a pair and checkpoint, `tokens.parquet` a row a token, `modules.parquet`
a row a module and checkpoint, `sample.parquet` a row a measured pair with its texts. Each kind of table has a `schema`,
a `write` and a `read` (`TableKind`), which are also functions: `pair_schema`, `write_pairs`, `read_pairs` and so on.
"""

from __future__ import annotations

from gradent.record.parquet import TableKind

__all__ = [
    "CASE_NAMES", "MODULES", "MODULE_COLUMNS", "PAIRS", "PAIR_COLUMNS", "SAMPLE", "SAMPLE_COLUMNS", "STEPS",
    "STEP_COLUMNS", "TOKENS", "TOKEN_COLUMNS", "pair_schema", "read_modules", "read_pairs", "read_sample", "read_steps",
    "read_tokens", "token_schema", "write_modules", "write_pairs", "write_sample", "write_steps", "write_tokens",
]  # fmt: skip

PAIR_COLUMNS: dict[str, str] = {
    "checkpoint": "string", "step": "int64", "pair": "int64", "chosen_sq": "float64", "rejected_sq": "float64",
    "inner": "float64", "cosine": "float64", "chosen_logp": "float64", "rejected_logp": "float64",
    "ref_chosen_logp": "float64", "ref_rejected_logp": "float64", "chosen_len": "int64", "rejected_len": "int64",
    "d_w": "float64", "d_l": "float64", "chosen_change": "float64", "rejected_change": "float64", "case": "int64",
}  # fmt: skip
"""Columns of `pairs.parquet` in order, each with its Arrow type. `pair` is the row of the data, counted from 0."""

MOVED_SOURCES = (
    "own", "partner", "others_chosen", "others_rejected", "earlier_batches", "momentum", "weight_decay",
)  # fmt: skip
"""What moves a response in an optimizer step, in the order of tables and panels."""

GROUP_SOURCES = (
    "own", "positives", "negatives", "other_groups", "earlier_batches", "momentum", "weight_decay",
)  # fmt: skip
"""The same of rows in groups: by the row itself, by its group's positives and negatives, by other groups."""

UNSPLIT = "step"
"""The one source of a step that is not split into those: all of it."""

MOVED_COLUMNS: dict[str, str] = {
    f"{side}_{name}": "float64"
    for side in ("chosen", "rejected")
    for name in (*(f"moved_{source}" for source in (*MOVED_SOURCES, UNSPLIT)), "realised")
}
"""Further columns of `pairs.jsonl`, null where they were not measured: nats that a step adds to a response's log-prob,
by source and to first order (`moved_step`: of a step that is not split), and what it really added."""

ROW_COLUMNS: dict[str, str] = {
    "step": "int64", "row": "int64", "group": "int64", "weight": "float64", "logp": "float64", "length": "int64",
    "sq": "float64",
}  # fmt: skip
"""Columns of `rows.jsonl`, of steps whose rows are no pairs: `weight` is `−∂L/∂log π(y|x)`, `sq` `‖∇ log π(y|x)‖²`."""

ROW_MOVED_COLUMNS: dict[str, str] = dict.fromkeys(
    (*(f"moved_{source}" for source in (*GROUP_SOURCES, UNSPLIT)), "realised"), "float64"
)
"""Further columns of `rows.jsonl`, as `MOVED_COLUMNS` of `pairs.jsonl`."""

NULLABLE = frozenset({"cosine", "ref_chosen_logp", "ref_rejected_logp"})
"""Columns that may hold null: no cosine where a gradient is zero, no reference where the loss needs none."""

CASE_NAMES: dict[int, str] = {1: "ideal", 2: "both_down", 3: "both_up", 4: "reversed", 0: "inactive"}
"""Meaning of the column `case`: Table 1 of the paper, `reversed` (chosen falls, rejected rises) and no gradient."""

TOKEN_COLUMNS: dict[str, str] = {
    "checkpoint": "string", "step": "int64", "pair": "int64", "side": "string", "position": "int64",
    "token_id": "int64", "token": "string", "identical": "bool_", "sq": "float64", "entanglement": "float64",
    "aligned_inner": "float64", "facing_inner": "float64", "own_inner": "float64",
}  # fmt: skip
"""Columns of `tokens.parquet` in order, each with its Arrow type: a row a token of a response, prompts left out.

`pair` is the row of the data, as in `pairs.parquet`; `side` is chosen or rejected; `position` counts from 0 at the
response's first token; `token` is its text; `identical` says whether the alignment of the two responses matches it.
`sq` is the squared norm of the token's gradient, `entanglement` its inner product with the gradient of the whole other
response (over a side it sums to the pair's `inner`), `aligned_inner` that with the token it is matched with (null where
differing), `facing_inner` that with the differing token it faces (null where identical, or where it faces none).
`own_inner` is its inner product with the gradient of its own whole response (over a side it sums to the response's
squared norm; null in records of before it was measured).
"""

MODULE_COLUMNS: dict[str, str] = {
    "checkpoint": "string", "step": "int64", "module": "string", "pairs": "int64", "cosine_part": "float64",
    "chosen_share": "float64", "rejected_share": "float64",
}  # fmt: skip
"""Columns of `modules.parquet` in order, each with its Arrow type: a row a module and checkpoint.

Means over the `pairs` whose cosine is defined: `cosine_part` is the module's part of the cosine (over all modules they
sum to the mean cosine), `chosen_share` and `rejected_share` its parts of `‖g_w‖²` and `‖g_l‖²` (they sum to 1).
"""

SAMPLE_COLUMNS: dict[str, str] = {
    "pair": "int64", "where": "string", "prompt": "string", "chosen": "string", "rejected": "string",
    "prompt_len": "int64", "chosen_len": "int64", "rejected_len": "int64", "shared_prefix": "int64",
    "shared_suffix": "int64", "edit_distance": "int64", "truncated": "int64",
}  # fmt: skip
"""Columns of `sample.parquet` in order, each with its Arrow type: a row a pair that an audit measured.

`pair` is the row of the data, as in `pairs.parquet`, and `where` its file and line; `prompt`, `chosen` and `rejected`
are texts. The rest counts tokens: of the prompt and both responses, of the longest beginning and the longest end (not
overlapping that beginning) that the responses share, of insertions, deletions and replacements that make one response
the other; `truncated` is how many of the two responses lost their end.
"""

STEP_COLUMNS: dict[str, str] = {
    "checkpoint": "string", "step": "int64", "pair": "int64",
    **{
        f"{side}_{name}": "float64"
        for side in ("chosen", "rejected")
        for name in ("own", "partner", "others", "arrived", "realised")
    },
}  # fmt: skip
"""Columns of `steps.parquet` in order, each with its Arrow type: a row a pair and checkpoint that an audit measured.

`own`, `partner` and `others` are what a step of plain gradient descent, of unit learning rate, on the mean loss of the
whole sample does to the response's log-prob, to first order, in nats: by the response itself, by the other one of its
pair, and by all other pairs. `arrived` is the first-order change since the checkpoint before (the mean of `⟨g_i, Δθ⟩`
at both), `realised` the real one; null at the first checkpoint.
"""

PAIRS = TableKind(name="pairs", columns=PAIR_COLUMNS, nullable=NULLABLE)
TOKENS = TableKind(
    name="tokens", columns=TOKEN_COLUMNS, nullable=frozenset({"aligned_inner", "facing_inner", "own_inner"})
)
MODULES = TableKind(name="modules", columns=MODULE_COLUMNS)
SAMPLE = TableKind(name="sample", columns=SAMPLE_COLUMNS)

STEPS = TableKind(
    name="steps", columns=STEP_COLUMNS,
    nullable=frozenset(f"{side}_{name}" for side in ("chosen", "rejected") for name in ("arrived", "realised")),
)  # fmt: skip

pair_schema, write_pairs, read_pairs = PAIRS.schema, PAIRS.write, PAIRS.read
token_schema, write_tokens, read_tokens = TOKENS.schema, TOKENS.write, TOKENS.read
write_modules, read_modules = MODULES.write, MODULES.read
write_sample, read_sample = SAMPLE.write, SAMPLE.read
write_steps, read_steps = STEPS.write, STEPS.read
