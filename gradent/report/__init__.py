"""Records to pages, panels and words. Reads what runs left behind and nothing else: no torch, no model."""

from gradent.report.audit.figures import write_audit_figures
from gradent.report.audit.page import write_audit_report
from gradent.report.audit.wandb import stream_audit
from gradent.report.compare.match import compare_rows
from gradent.report.compare.page import write_comparison
from gradent.report.demo import write_demo_report
from gradent.report.live.wandb import wandb_dashboard
from gradent.report.rebuild import write_report
from gradent.report.terminal.compare import print_comparison
from gradent.report.tokens.groups import write_group_report
from gradent.report.tokens.page import write_token_report

__all__ = [
    "compare_rows", "print_comparison", "stream_audit", "wandb_dashboard", "write_audit_figures", "write_audit_report",
    "write_comparison", "write_demo_report", "write_group_report", "write_report", "write_token_report",
]  # fmt: skip
