"""Triton and CUDA kernels for the self-attention of LocalDiT (extra `triton`)."""

from .processor import (
    LocalDiTTritonAttnProcessor,
    install_triton_kernels,
    uninstall_triton_kernels,
    why_not_triton,
)

__all__ = [
    "LocalDiTTritonAttnProcessor",
    "install_triton_kernels",
    "uninstall_triton_kernels",
    "why_not_triton",
]
