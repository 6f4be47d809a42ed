"""One self-contained HTML page: parts, charts, numbers."""
