"""Scanning a data set: stand-ins for every pair, exact values for a sample, and how well the ones rank the others."""
