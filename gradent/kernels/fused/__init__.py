"""Fused reductions in Triton: many ragged pairs in one launch, and no gradient in device memory.

Importing this package imports Triton. `gradent.kernels.dispatch` decides whether to.
"""
