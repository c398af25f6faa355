# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""Compiles `window_cpu.cpp` for the processor, once for all processes, and calls it."""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import constants

from ..transformer_localdit import WindowGeometry
from .bands import Band

SOURCE = Path(__file__).with_name("window_cpu.cpp")
COMPILER = "g++"  # whose OpenMP is that of PyTorch: with another one's threads they would wait for each other
OPTIONS = ["-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def instructions() -> list[str] | None:
    """The compiler's options for the widest vectors that the processor has, or `None` for less than AVX2."""
    has = torch.cpu.get_capabilities().get
    if platform.system() != "Linux" or not (has("avx2") and has("fma3")):
        return None
    wide = ["f", "bw", "dq", "vl"]
    if all(has(f"avx512_{part}") for part in wide):
        return ["-mfma", *(f"-mavx512{part}" for part in wide)]
    return ["-mfma", "-mavx2"]


class Attention(ctypes.Structure):
    """Of `window_cpu.cpp`, which says what each is."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "query_map")),
        *((name, ctypes.c_void_p) for name in ("key_of_padding", "value_of_padding")),
        *((name, ctypes.c_void_p) for name in ("norm_q", "norm_k", "bias", "mask", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("window_to_token", "places")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "windows", "across", "w", "heads", "d", "threads")),
        *((name, ctypes.c_float) for name in ("eps", "share")),
    ]


class Depthwise(ctypes.Structure):
    """Of `window_cpu.cpp`, which says what each is."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("map", "above", "below")),
        *((name, ctypes.c_int64) for name in ("above_stride", "below_stride")),
        *((name, ctypes.c_void_p) for name in ("weight", "features", "sums")),
        *((name, ctypes.c_int64) for name in ("batch", "rows", "columns", "channels", "threads")),
    ]


class Excitation(ctypes.Structure):
    """Of `window_cpu.cpp`, which says what each is."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("features", "gate")),
        *((name, ctypes.c_int64) for name in ("batch", "places", "channels", "threads")),
    ]


def compiled(options: list[str]) -> Path:
    """
    The library, compiled now or by an earlier process.

    Raises:
        `OSError`: If it cannot be compiled, with the compiler's first complaint.
    """
    command = [COMPILER, *OPTIONS, *options]
    if shutil.which(COMPILER) is None:
        raise OSError(f"there is no {COMPILER} (Debian, Ubuntu: `apt install g++`)")
    key = hashlib.sha256("\0".join([*command, SOURCE.read_text()]).encode()).hexdigest()
    folder = Path(constants.HF_HOME) / "diffusers_localdit"
    library = folder / f"window_cpu-{key[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Processes may compile at the same time: each to a name of its own, and the last one's stays.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            target = Path(own) / library.name
            process = subprocess.run([*command, "-o", target, SOURCE], capture_output=True, text=True)
            if process.returncode != 0:
                lines = [line for line in process.stderr.splitlines() if "error" in line] or [process.stderr]
                raise OSError(f"{COMPILER} cannot compile {SOURCE.name}: {lines[0].strip()}")
            os.replace(target, library)
    return library


@functools.cache
def load_library() -> ctypes.CDLL:
    """
    The library for this processor.

    Raises:
        `OSError`: If it cannot be had, with the reason.
    """
    options = instructions()
    if options is None:
        raise OSError("it is for Linux and processors with AVX2")
    return ctypes.CDLL(str(compiled(options)))


def run(name: str, dtype: torch.dtype, arguments: ctypes.Structure) -> None:
    getattr(load_library(), f"{name}_{DTYPES[dtype]}")(ctypes.byref(arguments))


def address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def bias_of_keys(table: torch.Tensor, geometry: WindowGeometry) -> torch.Tensor:
    """Position bias in the order of the kernel: `(heads, w*w, w*w)`, by key and query, which fill whole vectors."""
    bias = table.float()[geometry.relative_position.T].permute(2, 0, 1)
    return F.pad(bias, (0, -bias.shape[2] % load_library().lanes())).contiguous()


def evenly_spaced(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `(B, l, C)`, in a copy unless they follow each other at one distance, as parts of one projection do."""
    even = tokens.stride(2) == 1 and (tokens.shape[0] == 1 or tokens.stride(0) == tokens.shape[1] * tokens.stride(1))
    return tokens if even else tokens.contiguous()


def attend(name: str, bias_table: torch.Tensor, band: Band, settings: dict, **tensors) -> None:
    batch_size, length, channels = tensors["key"].shape
    geometry = band.geometry
    windows, members = band.places.shape
    tensors["bias"] = bias_of_keys(bias_table, geometry)
    tensors["mask"] = geometry.attention_mask.float()
    heads, w = bias_table.shape[1], math.isqrt(members)
    arguments = Attention(
        **{name: address(x) for name, x in tensors.items()},
        **settings,
        query_stride=tensors["query"].stride(1),
        key_stride=tensors["key"].stride(1),
        value_stride=tensors["value"].stride(1),
        places=address(band.places),
        batch=batch_size,
        tokens=length,
        windows=windows,
        across=geometry.map_to_token.shape[1] // w,
        w=w,
        heads=heads,
        d=channels // heads,
        threads=torch.get_num_threads(),
    )
    run(name, tensors["key"].dtype, arguments)


def local_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    bias_table: torch.Tensor,
    band: Band,
    eps: float,
    output_scale: float,
    output: torch.Tensor,
    with_maps: bool,
) -> torch.Tensor | None:
    r"""
    Local branch of LocalDiT's self-attention: RMS norm of queries and keys, rotary embedding, position bias, region
    mask and attention.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, l, C)`):
            Projected tokens of the band, evenly spaced, of one dtype, float32 or bfloat16.
        norm_q, norm_k (`torch.Tensor` of shape `(head_dim,)`): Weights of the norms.
        bias_table (`torch.Tensor` of shape `((2w-1)^2, heads)`): Relative position bias.
        band (`Band`): Some rows of windows; padding counts as zeros.
        eps (`float`): Of the norms.
        output_scale (`float`): Factor of the output.
        output (`torch.Tensor` of shape `(B, l, C)`): Where to write it, contiguous; may be `value`.
        with_maps (`bool`): Whether to write the prepared keys over `key`, for the context branch, and return queries.

    Returns:
        `torch.Tensor` of shape `(B, rows, Wp, C)`, *optional*: The prepared queries on the rolled map.
    """
    geometry = band.geometry
    width = geometry.map_to_token.shape[1]
    map_shape = (query.shape[0], band.places.numel() // width, width, query.shape[2])
    query_map = query.new_empty(map_shape) if with_maps else None
    attend(
        "local",
        bias_table,
        band,
        {"eps": eps, "share": output_scale},
        query=query,
        key=key,
        value=value,
        output=output,
        query_map=query_map,
        norm_q=norm_q.float(),
        norm_k=norm_k.float(),
        cos=geometry.rotary_cos,
        sin=geometry.rotary_sin,
        window_to_token=geometry.window_to_token,
    )
    return query_map


def add_context_window_attention_(
    output: torch.Tensor,
    query_map: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_of_padding: torch.Tensor | None,
    value_of_padding: torch.Tensor | None,
    bias_table: torch.Tensor,
    band: Band,
    output_scale: float,
) -> None:
    r"""
    Adds the context branch of LocalDiT's self-attention, times `output_scale`, to `output`.

    Args:
        output (`torch.Tensor` of shape `(B, l, C)`): That of the local branch, contiguous.
        key, value (`torch.Tensor` of shape `(B, l, C)`): As above.
        query_map (`torch.Tensor` of shape `(B, rows, Wp, C)`): Queries on the rolled map, contiguous.
        key_of_padding, value_of_padding (`torch.Tensor` of shape `(C,)`, *optional*): Needed where there is padding.
        bias_table (`torch.Tensor` of shape `((2w-1)^2, heads)`): Relative position bias.
        band (`Band`): Some rows of windows.
        output_scale (`float`): Factor of what is added.
    """
    tensors = {"query": query_map, "key": key, "value": value, "output": output}
    padding = {"key_of_padding": key_of_padding, "value_of_padding": value_of_padding}
    attend("context", bias_table, band, {"share": output_scale}, **tensors, **padding)


def depthwise_gelu(
    query_maps: list[torch.Tensor], index: int, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    `GELU(depthwise(x))` of one part of a map, with the exact GELU.

    Args:
        query_maps (`list[torch.Tensor]`): Parts `(B, rows, Wp, C)` of the map, contiguous, one below the other.
        index (`int`): Of the part.
        weight (`torch.Tensor` of shape `(C, 1, 3, 3)`): Of the convolution, which pads by zeros.

    Returns:
        The features `(B, rows, Wp, C)`, and their sum over rows and columns in float32, `(B, C)`.
    """
    part = query_maps[index]
    batch_size, rows, columns, channels = part.shape
    above = query_maps[index - 1][:, -1] if index > 0 else None
    below = query_maps[index + 1][:, 0] if index + 1 < len(query_maps) else None
    features = torch.empty_like(part)
    sums = part.new_zeros(batch_size, rows, channels, dtype=torch.float32)
    taps = weight.float().flatten(1).T.contiguous()
    arguments = Depthwise(
        map=address(part),
        above=address(above),
        below=address(below),
        above_stride=0 if above is None else above.stride(0),
        below_stride=0 if below is None else below.stride(0),
        weight=address(taps),
        features=address(features),
        sums=address(sums),
        batch=batch_size,
        rows=rows,
        columns=columns,
        channels=channels,
        threads=torch.get_num_threads(),
    )
    run("depthwise_gelu", part.dtype, arguments)
    return features, sums.sum(dim=1)


def excite_(features: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    r"""
    `features * gate`, in place.

    Args:
        features (`torch.Tensor` of shape `(B, rows, Wp, C)`): Contiguous.
        gate (`torch.Tensor` of shape `(B, C)`): A factor for each channel.
    """
    batch_size, rows, columns, channels = features.shape
    gate = gate.float().contiguous()
    arguments = Excitation(
        features=address(features),
        gate=address(gate),
        batch=batch_size,
        places=rows * columns,
        channels=channels,
        threads=torch.get_num_threads(),
    )
    run("excite", features.dtype, arguments)
    return features
