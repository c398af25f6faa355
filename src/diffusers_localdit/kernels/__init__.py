"""Kernels for the self-attention of LocalDiT: Triton and CUDA (extra `triton`), and on CPUs C++."""

from .cpu_processor import (
    LocalDiTCPUAttnProcessor,
    install_cpu_kernels,
    why_not_cpu_kernels,
)
from .processor import (
    LocalDiTTritonAttnProcessor,
    install_triton_kernels,
    uninstall_kernels,
    why_not_triton,
)
from .trial import try_cpu_kernels, try_triton_kernels

__all__ = [
    "LocalDiTCPUAttnProcessor",
    "LocalDiTTritonAttnProcessor",
    "install_cpu_kernels",
    "install_triton_kernels",
    "try_cpu_kernels",
    "try_triton_kernels",
    "uninstall_kernels",
    "why_not_cpu_kernels",
    "why_not_triton",
]
