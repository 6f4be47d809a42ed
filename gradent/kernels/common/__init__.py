"""Arithmetic that every reduction uses: accumulation, precision, streams, budgets and costs."""
