# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
Launches the CUDA kernels of `window4.cu`: windows of 4 x 4 tokens and heads of 72 channels in half precision, the
sizes of the released LocalDiT, for which they are faster than the Triton kernels (`docs/PERFORMANCE.md`). PyTorch
compiles them at the first call.
"""

import functools
import importlib.resources
import threading

import torch
from diffusers.utils import logging

logger = logging.get_logger(__name__)

WINDOW_SIZE = 4
HEAD_DIM = 72
WARPS = 4  # of a block
# Blocks that a multiprocessor is to hold: what limits the registers of a lane.
FORWARD_BLOCKS = 4
BACKWARD_BLOCKS = 2

TENSORS = (
    "query", "key", "value", "norm_q", "norm_k", "cos", "sin", "table", "map_to_token", "token_to_window",
)  # fmt: skip
PARAMETERS = ("norm_q", "norm_k", "table")
SIZES = ("batch_stride", "token_stride", "tokens", "map_height", "map_width")

_thread = threading.local()


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


def serves(common: dict, *others: torch.Tensor | None) -> bool:
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
        and all(x is None or (x.dtype == query.dtype and x.data_ptr() % 16 == 0) for x in halves)
        and all(x.dtype in (query.dtype, torch.float32) and x.data_ptr() % 16 == 0 for x in parameters)
        and all(x.dtype == torch.float32 and x.data_ptr() % 16 == 0 for x in floats)
        and all(x.dtype == torch.int64 for x in indices)
        and common["batch_stride"] % 8 == common["token_stride"] % 8 == 0
        and common["batch_stride"] < 2**31
        and may_launch(query)
    )


def tensors(common: dict) -> list[torch.Tensor]:
    """The arguments of both kernels that are tensors. Under autocast parameters come in float32."""
    dtype = common["query_ptr"].dtype
    return [common[f"{name}_ptr"].to(dtype) if name in PARAMETERS else common[f"{name}_ptr"] for name in TENSORS]


@functools.cache
def kernel(name: str, device: int, capability: tuple[int, int], macros: tuple[str, ...]):
    """A kernel, compiled for a device."""
    source = importlib.resources.files(__package__).joinpath("window4.cu").read_text()
    options = [*(f"-D{macro}" for macro in macros), "--use_fast_math"]
    capability = "{}{}".format(*capability)
    return compile_kernel(source, name, compute_capability=capability, nvcc_options=options)


def launch(name: str, device: torch.device, macros: dict[str, int], grid: tuple[int, int], args: list) -> None:
    join_context(device)
    macros = tuple(f"{key}={int(value)}" for key, value in macros.items())
    run = kernel(name, device.index, torch.cuda.get_device_capability(device), macros)
    run((*grid, 1), (32 * WARPS, 1, 1), args)


def blocks(units: int) -> int:
    return -(-units // WARPS)


def macros(common: dict, min_blocks: int, **flags: bool) -> dict[str, int]:
    """What the source is compiled for; `common` is what the Triton kernels of a call share."""
    return {
        "HEADS": common["HEADS"],
        "HALF": common["query_ptr"].dtype == torch.float16,
        "PREPARE": common["PREPARE"],
        "ROTARY": common["ROTARY"],
        "PADDED": common["map_height"] * common["map_width"] > common["tokens"],
        "MIN_BLOCKS": min_blocks,
        **flags,
    }


def forward(
    common: dict,
    residual: torch.Tensor | None,
    output: torch.Tensor,
    query_map: torch.Tensor,
    key_map: torch.Tensor,
    output_scale: float,
) -> None:
    """Fills `output` and, unless they are empty, the maps."""
    units = common["map_height"] * common["map_width"] // WINDOW_SIZE**2 * common["HEADS"]
    flags = {"MAPS": query_map.numel() > 0, "RESIDUAL": residual is not None}
    args = [
        *tensors(common),
        output if residual is None else residual,
        output,
        query_map,
        key_map,
        *(common[name] for name in SIZES),
        float(common["eps"]),
        float(output_scale),
    ]
    launch(
        "window4_forward",
        output.device,
        macros(common, FORWARD_BLOCKS, **flags),
        (blocks(units), output.shape[0]),
        args,
    )


def backward(common: dict, gradients, output_scale: float) -> None:
    """Fills the `window_attention.Gradients`."""
    output, programs = gradients.output, gradients.bias.shape[0]
    query, key, value, *others = tensors(common)
    args = [
        query,
        key,
        value,
        output,
        *others,
        *(gradients.maps or (output, output)),
        *gradients.inputs,
        gradients.norms,
        gradients.bias,
        programs,
        output.shape[0],
        *(common[name] for name in SIZES),
        float(common["eps"]),
        float(output_scale),
    ]
    launch(
        "window4_backward",
        output.device,
        macros(common, BACKWARD_BLOCKS, MAPS=gradients.maps is not None, RESIDUAL=False),
        (blocks(programs * common["HEADS"]), 1),
        args,
    )
