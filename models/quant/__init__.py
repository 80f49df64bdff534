"""Uniform integer quantization and the packing of its codes: pure tensor functions."""
