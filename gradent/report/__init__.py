"""Records to pages, panels and words. Reads what runs left behind and nothing else: no torch, no model.

`page` is what every report is made of (facts, tables, line charts) and its template; `curves` turns rows of
`pairs.parquet` into curves over steps; `demo` writes the page of `gradent demo`;
`window`, `words` and `wandb_panels` say and show what a running trainer measures.
"""

from gradent.report.demo import write_demo_report
from gradent.report.wandb_panels import wandb_dashboard

__all__ = ["wandb_dashboard", "write_demo_report"]
