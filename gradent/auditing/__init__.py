"""Auditing after the fact: measure every pair at every checkpoint, write the records, print the tables."""
