"""`gradent plan`: what `measure` would do to a model, without its weights."""
