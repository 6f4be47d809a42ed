"""The outer form: products of rows from tiles of their gradients."""
