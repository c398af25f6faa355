"""Launches the CUDA kernels of window4.cu on a CPU, one lane after the other, as emulated_warp.cpp does."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from diffusers_localdit.kernels import window4

SOURCE = Path(window4.__file__).with_name("window4.cu")


@functools.cache
def library(name: str, macros: tuple[str, ...]) -> ctypes.CDLL:
    path = Path(tempfile.mkdtemp()) / "emulated.so"
    macros = (name.upper(), f"KERNEL={name}", f'KERNELS="{SOURCE}"', *macros)
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-o", str(path)]
    command += [*(f"-D{macro}" for macro in macros), str(Path(__file__).with_suffix(".cpp"))]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return ctypes.CDLL(str(path))


def launch(name: str, device: torch.device, macros: dict[str, int], grid: tuple[int, int, int], args: list) -> None:
    """In place of `window4.launch`."""
    kinds = {int: ctypes.c_int, float: ctypes.c_double}
    values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else kinds[type(x)](x) for x in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    library(name, tuple(f"{key}={int(value)}" for key, value in macros.items())).launch_kernel(pointers, *grid)
