# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
Launches the CUDA kernels of `window4.cu`: windows of 4 x 4 tokens and heads of 72 channels in half precision, the
sizes of the released LocalDiT, for which they are faster than the Triton kernels (`docs/PERFORMANCE.md`). PyTorch
compiles them at the first call.
"""

import functools
import importlib.resources
import threading
from typing import NamedTuple

import torch
from diffusers.utils import logging

logger = logging.get_logger(__name__)

WINDOW_SIZE = 4
HEAD_DIM = 72


class Occupancy(NamedTuple):
    """How many warps a multiprocessor holds, which limits the registers of a lane."""

    warps: int  # of a block
    blocks: int


OCCUPANCY = {
    "window4_local": Occupancy(warps=4, blocks=2),
    "window4_context": Occupancy(warps=4, blocks=4),
    "window4_backward": Occupancy(warps=2, blocks=4),
}

TENSORS = (
    "query", "key", "value", "norm_q", "norm_k", "cos", "sin", "table", "map_to_token", "token_to_window",
)  # fmt: skip
CONTEXT_TENSORS = tuple(name for name in TENSORS if name not in ("norm_q", "norm_k", "cos", "sin"))
PARAMETERS = ("norm_q", "norm_k", "table")
SIZES = ("batch_stride", "token_stride", "tokens", "map_height", "map_width")

_thread = threading.local()
_compiling = threading.Lock()


def join_context(device: torch.device) -> None:
    """
    Gives this thread the device's context, as the first kernel of PyTorch in it does. Launches through the driver need
    one, and backward passes run in threads of their own.
    """
    if not hasattr(_thread, "has_context"):
        torch.zeros(1, device=device)
        _thread.has_context = True


def compile_kernel(source: str, name: str, **settings):
    """
    A kernel, compiled by PyTorch. It names the folder of a toolkit's headers to the compiler, and fails where there is
    no toolkit; these kernels include no header, so that any name will do.
    """
    from torch.utils import cpp_extension  # needs setuptools

    with _compiling:  # or another thread would find, and put back, the name that is set here
        toolkit = cpp_extension.CUDA_HOME
        cpp_extension.CUDA_HOME = toolkit or "no-toolkit"
        try:
            return torch.cuda._compile_kernel(source, name, **settings)
        finally:
            cpp_extension.CUDA_HOME = toolkit


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether PyTorch finds what it compiles CUDA with; if not, it is said once, and Triton's kernels serve."""
    join_context(device)
    try:
        compile_kernel('extern "C" __global__ void nothing() {}', "nothing")
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        logger.warning(
            f"PyTorch cannot compile CUDA kernels here, Triton's are used instead, which are slower: {error}"
        )
        return False
    return True


def may_launch(tensor: torch.Tensor) -> bool:
    """Whether the kernels can run where a tensor is."""
    return tensor.is_cuda and torch.version.cuda is not None and can_compile(tensor.device)


def serves(common: dict, *others: torch.Tensor) -> bool:
    """
    Whether the kernels are made for these sizes and types, and for tensors that lie so that 16 bytes can be read at
    once. `common` is what the Triton kernels of a call share, `others` are further tensors in half precision.
    """
    query = common["query_ptr"]
    halves = [query, *(common[f"{name}_ptr"] for name in ("key", "value")), *others]
    parameters = [common[f"{name}_ptr"] for name in PARAMETERS]
    floats = [common["cos_ptr"], common["sin_ptr"]] if common["ROTARY"] else []
    indices = [common["map_to_token_ptr"], common["token_to_window_ptr"]]
    return (
        (common["W"], common["HEAD_DIM"]) == (WINDOW_SIZE, HEAD_DIM)
        and query.dtype in (torch.float16, torch.bfloat16)
        and all(x.dtype == query.dtype and x.data_ptr() % 16 == 0 for x in halves)
        and all(x.dtype in (query.dtype, torch.float32) and x.data_ptr() % 16 == 0 for x in parameters)
        and all(x.dtype == torch.float32 and x.data_ptr() % 16 == 0 for x in floats)
        and all(x.dtype == torch.int64 for x in indices)
        and common["batch_stride"] % 8 == common["token_stride"] % 8 == 0
        and common["batch_stride"] < 2**31
        and may_launch(query)
    )


def tensors(common: dict, names: tuple[str, ...] = TENSORS) -> list[torch.Tensor]:
    """The arguments of a kernel that are tensors. Under autocast parameters come in float32."""
    dtype = common["query_ptr"].dtype
    return [common[f"{name}_ptr"].to(dtype) if name in PARAMETERS else common[f"{name}_ptr"] for name in names]


@functools.cache
def kernel(name: str, device: int, capability: tuple[int, int], macros: tuple[str, ...]):
    """A kernel, compiled for a device."""
    source = importlib.resources.files(__package__).joinpath("window4.cu").read_text()
    options = [f"-D{name.upper()}", *(f"-D{macro}" for macro in macros), "--use_fast_math"]
    capability = "{}{}".format(*capability)
    return compile_kernel(source, name, compute_capability=capability, nvcc_options=options)


def launch(name: str, device: torch.device, macros: dict[str, int], grid: tuple[int, int, int], args: list) -> None:
    join_context(device)
    settings = tuple(f"{key}={int(value)}" for key, value in macros.items())
    run = kernel(name, device.index, torch.cuda.get_device_capability(device), settings)
    run(grid, (32 * macros["WARPS"], 1, 1), args)


def run(name: str, common: dict, grid: tuple[int, int, int], args: list, **flags: bool) -> None:
    """Launches a kernel, compiled for what `common`, which the Triton kernels of a call share, and `flags` say."""
    occupancy = OCCUPANCY[name]
    macros = {
        "HEADS": common["HEADS"],
        "HALF": common["query_ptr"].dtype == torch.float16,
        "PREPARE": common["PREPARE"],
        "ROTARY": common["ROTARY"],
        "PADDED": common["map_height"] * common["map_width"] > common["tokens"],
        "WARPS": occupancy.warps,
        "MIN_BLOCKS": occupancy.blocks,
        **flags,
    }
    launch(name, common["query_ptr"].device, macros, grid, args)


def blocks(name: str, warps: int) -> int:
    return -(-warps // OCCUPANCY[name].warps)


def sizes(common: dict) -> list[int]:
    return [common["query_ptr"].shape[0], *(common[name] for name in SIZES)]


def resident_warps(name: str, device: torch.device) -> int:
    """How many warps of a kernel run at a time."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count * OCCUPANCY[name].blocks * OCCUPANCY[name].warps
    )


def local_forward(
    common: dict, output: torch.Tensor, query_map: torch.Tensor, key_map: torch.Tensor, output_scale: float
) -> None:
    """Fills `output` and, unless they are empty, the maps."""
    name = "window4_local"
    windows = output.shape[0] * common["map_height"] * common["map_width"] // WINDOW_SIZE**2
    programs = min(windows, max(1, resident_warps(name, output.device) // common["HEADS"]))
    run(
        name,
        common,
        (blocks(name, programs * common["HEADS"]), 1, 1),
        [
            *(*tensors(common), output, query_map, key_map),
            *(programs, *sizes(common), float(common["eps"]), float(output_scale)),
        ],
        MAPS=query_map.numel() > 0,
    )


def context_forward(common: dict, residual: torch.Tensor, output: torch.Tensor, output_scale: float) -> None:
    """Fills `output`."""
    name = "window4_context"
    across, down = common["map_width"] // WINDOW_SIZE, common["map_height"] // WINDOW_SIZE
    run(
        name,
        common,
        (blocks(name, across * common["HEADS"]), down, output.shape[0]),
        [*tensors(common, CONTEXT_TENSORS), residual, output, *sizes(common), float(output_scale)],
    )


def backward(common: dict, gradients, output_scale: float) -> None:
    """Fills the `window_attention.Gradients`."""
    name = "window4_backward"
    output, programs = gradients.output, gradients.bias.shape[0]
    query, key, value, *others = tensors(common)
    maps = gradients.maps or (output, output)
    run(
        name,
        common,
        (blocks(name, programs * common["HEADS"]), 1, 1),
        [
            *(query, key, value, output, *others, *maps, *gradients.inputs, gradients.norms, gradients.bias),
            *(programs, *sizes(common), float(common["eps"]), float(output_scale)),
        ],
        MAPS=gradients.maps is not None,
    )
