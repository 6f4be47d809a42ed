"""What the paper says of measured entries: Conditions 1 and 2, Table 1, and the closed forms of Section 4."""

from gradent.theory.closed_forms import Entries, TokenChanges, corollary_2, head_gram, theorem_1, theorem_3
from gradent.theory.conditions import CASES, Verdict, case_numbers, verdict

__all__ = [
    "CASES",
    "Entries",
    "TokenChanges",
    "Verdict",
    "case_numbers",
    "corollary_2",
    "head_gram",
    "theorem_1",
    "theorem_3",
    "verdict",
]
