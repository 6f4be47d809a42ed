"""The Gram form: products of rows from their tokens' dot products."""
