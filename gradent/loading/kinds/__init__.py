"""What files say of a model before it is built: its class, its quantization."""
