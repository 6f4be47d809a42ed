"""The outer form: tiles of `uᵀv`, multiplied and summed."""
