"""Finding and reading what an audit needs: models, adapters, preference data."""
