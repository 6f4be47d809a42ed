"""What every reduction stands on: accumulation, budgets, costs, streams, Triton operands and tiles."""
