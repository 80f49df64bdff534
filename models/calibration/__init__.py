"""Calibration tokens, and the statistics taken from them."""
