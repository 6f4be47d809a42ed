"""Parts of `examples/stand_ins.py`."""
