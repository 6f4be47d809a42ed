"""gradent measures gradient entanglement in preference optimization: `⟨∇log π(y_w), ∇log π(y_l)⟩`, exactly.

`measure` gives the Gram entries of every preference pair, `verdict` says under a loss which log-probs will rise and
fall, `audit` does both for a model and a file of pairs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradent.version import __version__

if TYPE_CHECKING:
    from gradent import losses, proxies
    from gradent.auditing.api import audit
    from gradent.errors import GradentError, GradentWarning
    from gradent.measurement import measure, measure_rows
    from gradent.pair_gram import PairGram
    from gradent.pairs.batch import PairBatch
    from gradent.pairs.row_batch import RowBatch
    from gradent.recorder import attach
    from gradent.row_gram import RowGram
    from gradent.scanning.api import scan
    from gradent.selecting.api import select
    from gradent.theory.conditions import Verdict, verdict
    from gradent.tokens.effects import token_effects
    from gradent.tokens.gram import TokenGram
    from gradent.tokens.influence import TokenInfluence, token_influence
    from gradent.tokens.matrix import measure_tokens
    from gradent.trainer import EntanglementCallback

__all__ = [
    "EntanglementCallback",
    "GradentError",
    "GradentWarning",
    "PairBatch",
    "PairGram",
    "RowBatch",
    "RowGram",
    "TokenGram",
    "TokenInfluence",
    "Verdict",
    "__version__",
    "attach",
    "audit",
    "losses",
    "measure",
    "measure_rows",
    "measure_tokens",
    "proxies",
    "scan",
    "select",
    "token_effects",
    "token_influence",
    "verdict",
]

# Public name -> the module that defines it, imported when the name is first asked for: reading records and
# `gradent --help` need no torch.
_HOME = {
    "EntanglementCallback": "gradent.trainer",
    "GradentError": "gradent.errors",
    "GradentWarning": "gradent.errors",
    "PairBatch": "gradent.pairs.batch",
    "PairGram": "gradent.pair_gram",
    "RowBatch": "gradent.pairs.row_batch",
    "RowGram": "gradent.row_gram",
    "TokenGram": "gradent.tokens.gram",
    "TokenInfluence": "gradent.tokens.influence",
    "Verdict": "gradent.theory.conditions",
    "attach": "gradent.recorder",
    "audit": "gradent.auditing.api",
    "losses": "gradent.losses",
    "measure": "gradent.measurement",
    "measure_rows": "gradent.measurement",
    "measure_tokens": "gradent.tokens.matrix",
    "proxies": "gradent.proxies",
    "scan": "gradent.scanning.api",
    "select": "gradent.selecting.api",
    "token_effects": "gradent.tokens.effects",
    "token_influence": "gradent.tokens.influence",
    "verdict": "gradent.theory.conditions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradent' has no attribute {name!r}")
    module = import_module(_HOME[name])
    return module if name in {"losses", "proxies"} else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
