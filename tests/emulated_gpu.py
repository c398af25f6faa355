"""
A GPU for machines without one (emulated_gpu.cpp): it computes on the CPU, but like a GPU refuses tensors that are not
there, so that what forgets to move one, or takes a weight away too early, shows.

A plugin of pytest (`-p emulated_gpu`), since PyTorch asks for GPUs when it is imported; for builds without CUDA.
"""

import contextlib
import ctypes
import importlib.util
import subprocess
import tempfile
from pathlib import Path


def build(folder: Path) -> Path:
    """The library, compiled with PyTorch's headers."""
    torch_folder = importlib.util.find_spec("torch").submodule_search_locations[0]
    path = folder / "emulated_gpu.so"
    libraries = [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{torch_folder}/include", "-o", str(path)]
    command += [str(Path(__file__).with_suffix(".cpp")), "-Wl,--no-as-needed", *libraries]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return path


with tempfile.TemporaryDirectory() as folder:
    ctypes.CDLL(str(build(Path(folder))))

import torch  # noqa: E402


class Stream:
    """What is done is done at once."""

    def synchronize(self) -> None:
        pass


ANSWERS = {
    "_lazy_init": None,
    "current_device": 0,
    "current_stream": Stream(),
    "device_count": 1,
    "device_of": contextlib.nullcontext(),
    "empty_cache": None,
    "is_available": True,
    "is_bf16_supported": True,
    "manual_seed_all": None,
    "stream": contextlib.nullcontext(),
}
torch.cuda.Stream = Stream
for name, answer in ANSWERS.items():
    setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
