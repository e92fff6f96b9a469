"""Triton kernels of mlpint: one module an operation, with a plain PyTorch reference beside each kernel.

Installed as `mlpint.kernels`. Importing the package itself imports no Triton and needs no GPU.
"""

from .explanation import explain

__all__ = ["explain"]
