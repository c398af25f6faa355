"""Launches the CUDA kernels of window4.cu on a CPU, one lane after the other, as emulated_warp.cpp does."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from watched_memory import span

from diffusers_localdit.kernels import window4

# A call of ours at each access to memory, but of no other part of the sanitizer.
WATCHED = ["-fsanitize=kernel-address"]
for parameter in ("asan-instrumentation-with-call-threshold", "asan-stack", "asan-globals"):
    WATCHED += ["--param", f"{parameter}=0"]
# An index that is outside of an array ends the process.
WATCHED += ["-fsanitize=bounds,object-size", "-fsanitize-undefined-trap-on-error"]
SOURCE = Path(window4.__file__).with_name("window4.cu")


@functools.cache
def library(name: str, macros: tuple[str, ...]) -> ctypes.CDLL:
    path = Path(tempfile.mkdtemp()) / "emulated.so"
    macros = (name.upper(), f"KERNEL={name}", f'KERNELS="{SOURCE}"', *macros)
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-o", str(path), *WATCHED]
    command += [*(f"-D{macro}" for macro in macros), str(Path(__file__).with_suffix(".cpp"))]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return ctypes.CDLL(str(path))


def launch(name: str, device: torch.device, macros: dict[str, int], grid: tuple[int, int, int], args: list) -> None:
    """In place of `window4.launch`."""
    kinds = {int: ctypes.c_int, float: ctypes.c_double}
    values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else kinds[type(x)](x) for x in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    begins, ends = zip(*(span(x) for x in args if isinstance(x, torch.Tensor) and x.numel() > 0))
    count, addresses = len(begins), ctypes.c_size_t * len(begins)
    faults = (ctypes.c_int * 2)()
    run = library(name, tuple(f"{key}={int(value)}" for key, value in macros.items())).launch_kernel
    run(pointers, *grid, count, addresses(*begins), addresses(*ends), faults)
    outside, shared = faults
    assert not outside, f"{name} would read or write outside of all tensors"
    assert not shared, f"{shared} numbers are touched by one warp of {name} and written by another"
