"""What a running trainer shows: windows of steps, alerts in words, wandb panels."""
