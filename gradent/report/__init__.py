"""Records to pages, panels and words. Reads what runs left behind and nothing else: no torch, no model.

`page` is what every report is made of (`parts`: tables, texts, notices; `figure` and `plotly_figure`: charts, bars and
heat maps; `figure_text`: the same for those who do not see them) and its template; `numbers` and `cases` are how
figures and the paper's cases read everywhere; `curves` turns rows of `pairs.parquet` into curves over steps.
`audit` writes the page of `gradent audit` from sections in `audit_*`, `audit_figures` its pictures, `audit_wandb` sends
it to wandb; `compare` holds two audits against each other; `demo` writes the page of `gradent demo`, `tokens` that of
`gradent tokens`; `rebuild` makes anew whatever a directory allows.
`window`, `words` and `wandb_panels` say and show what a running trainer measures.
"""

from gradent.report.audit.figures import write_audit_figures
from gradent.report.audit.page import write_audit_report
from gradent.report.audit.wandb import stream_audit
from gradent.report.compare.match import compare_rows
from gradent.report.compare.page import write_comparison
from gradent.report.demo import write_demo_report
from gradent.report.live.wandb import wandb_dashboard
from gradent.report.rebuild import write_report
from gradent.report.terminal.compare import print_comparison
from gradent.report.tokens.page import write_token_report

__all__ = [
    "compare_rows",
    "print_comparison",
    "stream_audit",
    "wandb_dashboard",
    "write_audit_figures",
    "write_audit_report",
    "write_comparison",
    "write_demo_report",
    "write_report",
    "write_token_report",
]
