"""Equivalent rewrites of a network that make it easier to quantize: pure tensor functions."""
