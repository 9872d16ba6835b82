"""Triton kernels: each file has the kernel, its launcher and the same in plain PyTorch."""
