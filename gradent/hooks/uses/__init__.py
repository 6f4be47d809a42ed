"""Uses of a parameter in a forward pass, and the formats in which a row's gradient is held."""
