"""Records to pages, panels and words. Reads what runs left behind and nothing else: no torch, no model.

`page` is what every report is made of (facts, tables, coloured text, and `figure`'s charts and heat maps) and its
template; `curves` turns rows of `pairs.parquet` into curves over steps; `demo` writes the page of `gradent demo`,
`tokens` that of `gradent tokens`;
`window`, `words` and `wandb_panels` say and show what a running trainer measures.
"""

from gradent.report.demo import write_demo_report
from gradent.report.tokens import write_token_report
from gradent.report.wandb_panels import wandb_dashboard

__all__ = ["wandb_dashboard", "write_demo_report", "write_token_report"]
