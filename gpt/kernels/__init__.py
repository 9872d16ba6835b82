"""Triton kernels: in each file the kernel, its launcher, and the same written plainly in PyTorch."""
