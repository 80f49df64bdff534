"""The artifact `qerve-1`: what a build writes and the service loads; safetensors only, every byte vouched for."""
