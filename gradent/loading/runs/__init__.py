"""What a trainer left behind: checkpoints, adapters and their base, the log."""
