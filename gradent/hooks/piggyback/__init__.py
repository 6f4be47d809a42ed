"""Reading the Gram entries off a trainer's own backward pass."""
