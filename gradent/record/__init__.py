"""What runs leave behind, versioned: parquet tables (`schema`) and JSON records (`documents`).

Nothing here imports torch or, until a parquet file is touched, pyarrow: a report reads records and nothing else.
"""

from gradent.record.documents import (
    AUDIT_FILES,
    DemoRecord,
    GroupTokenRecord,
    Summary,
    TokenRecord,
    read_demo,
    read_group_tokens,
    read_summary,
    read_token_record,
    write_demo,
    write_group_tokens,
    write_summary,
    write_token_record,
)
from gradent.record.parquet import SCHEMA_VERSION
from gradent.record.schema import (
    CASE_NAMES,
    GROUP_SOURCES,
    MODULE_COLUMNS,
    MOVED_COLUMNS,
    MOVED_SOURCES,
    PAIR_COLUMNS,
    ROW_COLUMNS,
    ROW_MOVED_COLUMNS,
    SAMPLE_COLUMNS,
    STEP_COLUMNS,
    TOKEN_COLUMNS,
    UNSPLIT,
    pair_schema,
    read_modules,
    read_pairs,
    read_sample,
    read_steps,
    read_tokens,
    token_schema,
    write_modules,
    write_pairs,
    write_sample,
    write_steps,
    write_tokens,
)

__all__ = [
    "AUDIT_FILES", "CASE_NAMES", "GROUP_SOURCES", "MODULE_COLUMNS", "MOVED_COLUMNS", "MOVED_SOURCES",
    "PAIR_COLUMNS", "ROW_COLUMNS", "ROW_MOVED_COLUMNS", "SAMPLE_COLUMNS", "SCHEMA_VERSION", "STEP_COLUMNS",
    "TOKEN_COLUMNS", "UNSPLIT", "DemoRecord", "GroupTokenRecord", "Summary", "TokenRecord", "pair_schema",
    "read_demo", "read_group_tokens", "read_modules", "read_pairs", "read_sample", "read_steps", "read_summary",
    "read_token_record", "read_tokens", "token_schema", "write_demo", "write_group_tokens", "write_modules",
    "write_pairs", "write_sample", "write_steps", "write_summary", "write_token_record", "write_tokens",
]  # fmt: skip
