"""Triton and CUDA kernels for the self-attention of LocalDiT (extra `triton`)."""

from .processor import (
    LocalDiTTritonAttnProcessor,
    install_triton_kernels,
    uninstall_triton_kernels,
    why_not_triton,
)
from .trial import try_triton_kernels

__all__ = [
    "LocalDiTTritonAttnProcessor",
    "install_triton_kernels",
    "try_triton_kernels",
    "uninstall_triton_kernels",
    "why_not_triton",
]
