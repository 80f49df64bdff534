"""Kernels for NVIDIA GPUs, written in Triton; the modules with kernels are imported only where they run."""
