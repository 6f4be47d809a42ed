"""From measured pairs to statements: dynamics, properties, what-if losses, a recommendation."""
