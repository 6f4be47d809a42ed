"""Recording every use of a trainable parameter while a model runs, and proving that none was missed."""
