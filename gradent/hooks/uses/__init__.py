"""Uses of a parameter: which part of it meets which activations, and the form of its gradient."""
