"""Offline half of qerve: numerics, kernels, the network, the artifact, the build pipeline."""
