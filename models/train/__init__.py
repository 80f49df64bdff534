"""Training of quantized decoder layers against the dense ones: trainable parameters, the block-wise loop."""
