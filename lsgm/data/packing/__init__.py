"""Packing what people have into one memory-mapped data set."""
