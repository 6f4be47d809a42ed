"""Uses of a parameter: which part of it meets which activations, and the form of its gradient.

What arrives at an operator's output in the backward pass is called `grad_output`, as in PyTorch, and b in formulas.
"""
