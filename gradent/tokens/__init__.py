"""The token level: gradients of single tokens, their inner products, and what a step does to each token."""
