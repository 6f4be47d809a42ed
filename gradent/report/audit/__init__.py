"""The page, the pictures and the wandb run of an audit."""
