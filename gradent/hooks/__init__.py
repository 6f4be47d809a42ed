"""Capture: what each operator does with a trainable parameter, seen while the model runs and reduced as it arrives."""
