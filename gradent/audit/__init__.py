"""Auditing after the fact: load a model, measure every pair of a data set, write the records, print the tables."""

from gradent.auditing.api import AuditResult, audit

__all__ = ["AuditResult", "audit"]
