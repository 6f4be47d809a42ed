"""What figures are, and how plotly and matplotlib draw them."""
