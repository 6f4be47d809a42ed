"""Reductions: from the captured factors of two gradients to three scalars, inside a memory budget."""
