"""The network and where it comes from: configuration, checkpoints, tokenizer, attention, key-value cache."""
