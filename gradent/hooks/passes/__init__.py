"""Forward and backward passes over rows: three engines and the micro-batches that they take."""
