# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
Launches the kernels of shifted-window attention: each tensor is read once and written once. For the sizes of the
released model in half precision they are the CUDA kernels of `window4.cu`, else those of Triton.

A program serves one tile of one window. It finds its tokens through the index map (shift and padding are in it),
normalises and turns queries and keys in registers, attends, and writes to the tokens' own places. `reference.py` says
the same in PyTorch and is what these kernels are tested against.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import window4
from .part_sums import sum_parts
from .triton_backward import _backward, _backward_bias, _gather_table_gradient, _statistics
from .triton_forward import _forward

# Heads that a program of the forward pass serves one after the other: it finds its tokens and loads the rotary table
# once, and while it computes one head, what the next one needs is on its way.
FORWARD_HEADS = 8
# Programs per head of a backward pass (warps in the CUDA kernels). Each sums its windows' share of the parameters'
# gradients in registers, in a fixed order, and writes it once: the result does not depend on the machine.
BACKWARD_PROGRAMS = 64


def column_blocks(head_dim: int) -> tuple[int, int]:
    """Columns of a head's block, or of its two blocks where that makes fewer in all; powers of two from 16."""
    whole = max(16, triton.next_power_of_2(head_dim))
    main = whole // 2
    rest = max(16, triton.next_power_of_2(head_dim - main)) if main >= 16 else whole
    return (main, rest) if main + rest < whole else (whole, 0)


def rows_of_tile(members: int, main: int, element_size: int) -> int:
    """Rows of a tile: the window's members, or as many as the backward pass holds in 99 KiB of shared memory."""
    most = 64 if element_size == 2 else 32
    if members > most and main > 64:
        most //= 2
    return min(max(16, triton.next_power_of_2(members)), most)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Type of the operands of matrix products. The interpreter would multiply the bits of bfloat16 as integers."""
    if triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


class Gradients(NamedTuple):
    """What a backward pass is given, and what it fills: sums over programs last."""

    output: torch.Tensor  # (B, L, C)
    maps: tuple[torch.Tensor, torch.Tensor] | None  # of query and key, (B, M, C) each
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of query, key and value
    norms: torch.Tensor  # (2, programs, HEADS, TILES, HEAD_DIM)
    bias: torch.Tensor  # (programs, HEADS, w*w, w*w)


class Preparation(NamedTuple):
    """How queries and keys in image order are made ready. Without one they are ready, and in the order of the map."""

    norm_q: torch.Tensor
    norm_k: torch.Tensor
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    eps: float


def _common_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    preparation: Preparation | None,
    bias_table: torch.Tensor,
    map_to_token: torch.Tensor,
    token_to_window: torch.Tensor,
    window_size: int,
) -> dict:
    """What all kernels of a call share. Pointers that a kernel does not follow are given as `bias_table`."""
    # Parts of one packed projection have equal strides and are read where they are.
    if query.stride(-1) != 1 or not query.stride() == key.stride() == value.stride():
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    bias_table = bias_table.contiguous()
    prepare = preparation is not None
    rotary = prepare and preparation.rotary_cos is not None
    head_dim = query.shape[-1] // bias_table.shape[1]
    main, rest = column_blocks(head_dim)
    rows = rows_of_tile(window_size**2, main, query.element_size())
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "norm_q_ptr": preparation.norm_q.contiguous() if prepare else bias_table,
        "norm_k_ptr": preparation.norm_k.contiguous() if prepare else bias_table,
        "cos_ptr": preparation.rotary_cos.contiguous() if rotary else bias_table,
        "sin_ptr": preparation.rotary_sin.contiguous() if rotary else bias_table,
        "table_ptr": bias_table,
        "map_to_token_ptr": map_to_token.contiguous(),
        "token_to_window_ptr": token_to_window,
        "batch_stride": query.stride(0),
        "token_stride": query.stride(1),
        "tokens": token_to_window.shape[0],
        "map_height": map_to_token.shape[0],
        "map_width": map_to_token.shape[1],
        "eps": preparation.eps if prepare else 0.0,
        "PREPARE": prepare,
        "ROTARY": rotary,
        "HEADS": bias_table.shape[1],
        "HEAD_DIM": head_dim,
        "W": window_size,
        "TILES": triton.cdiv(window_size**2, rows),
        "ROWS": rows,
        "MAIN": main,
        "REST": rest,
        "DOT": dot_dtype(query.dtype),
        "num_warps": rows // 16,
        "num_stages": 1,
    }


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    preparation: Preparation | None,
    bias_table: torch.Tensor,
    map_to_token: torch.Tensor,
    token_to_window: torch.Tensor,
    window_size: int,
    output_scale: float,
    residual: torch.Tensor | None = None,
    with_maps: bool = False,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Attends within windows. With `overwrite` (and a preparation) the output is written over `query`, which has to be
    contiguous: a program reads of it what it then writes, and nothing else.

    Returns:
        `output_scale` times the attention, plus `residual`, `(B, L, C)`; and with `with_maps` the prepared queries and
        keys on the map, `(B, Hp, Wp, C)`, otherwise two empty tensors.
    """
    if overwrite and not query.is_contiguous():
        raise ValueError("The output can only be written over a tensor whose numbers follow each other.")
    common = _common_arguments(query, key, value, preparation, bias_table, map_to_token, token_to_window, window_size)
    batch_size, _, width = query.shape
    windows = map_to_token.numel() // window_size**2
    output = query if overwrite else query.new_empty(batch_size, common["tokens"], width)
    map_shape = (batch_size, *map_to_token.shape, width) if with_maps else (0,)
    query_map, key_map = query.new_empty(map_shape), query.new_empty(map_shape)
    residual = None if residual is None else residual.contiguous()
    with torch.cuda.device_of(query):
        if preparation is not None and residual is None and window4.serves(common):
            window4.local_forward(common, output, query_map, key_map, output_scale)
            return output, query_map, key_map
        if preparation is None and residual is not None and window4.serves(common, residual):
            window4.context_forward(common, residual, output, output_scale)
            return output, query_map, key_map
        group = FORWARD_HEADS if common["TILES"] == 1 else 1
        _forward[windows * common["TILES"] * triton.cdiv(common["HEADS"], group), batch_size](
            **common,
            residual_ptr=output if residual is None else residual,
            output_ptr=output,
            query_map_ptr=query_map,
            key_map_ptr=key_map,
            output_scale=output_scale,
            MAPS=with_maps,
            RESIDUAL=residual is not None,
            GROUP=group,
            STAGES=2,
        )
    return output, query_map, key_map


def backward(
    grad_output: torch.Tensor,
    grad_query_map: torch.Tensor | None,
    grad_key_map: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    preparation: Preparation | None,
    bias_table: torch.Tensor,
    map_to_token: torch.Tensor,
    token_to_window: torch.Tensor,
    window_size: int,
    output_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Gradients of query, key, value, of both norms' weights `(2, head_dim)` in float32 (without a preparation
    anything) and of the bias table.
    """
    common = _common_arguments(query, key, value, preparation, bias_table, map_to_token, token_to_window, window_size)
    heads, head_dim, tiles = (common[name] for name in ("HEADS", "HEAD_DIM", "TILES"))
    batch_size = query.shape[0]
    windows = map_to_token.numel() // window_size**2
    programs = min(batch_size * windows, BACKWARD_PROGRAMS)
    grad_output = grad_output.contiguous()
    grad_maps = None if grad_query_map is None else (grad_query_map.contiguous(), grad_key_map.contiguous())

    def empty_float(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    gradients = Gradients(
        grad_output,
        grad_maps,
        tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)),
        empty_float(2, programs, heads, tiles, head_dim),
        empty_float(programs, heads, window_size**2, window_size**2),
    )
    with torch.cuda.device_of(query):
        if window4.serves(common, grad_output, *(grad_maps or ())):
            window4.backward(common, gradients, output_scale)
        else:
            _launch_backward(common, gradients, output_scale)
        grad_table = torch.empty(bias_table.shape, dtype=bias_table.dtype, device=bias_table.device)
        members = triton.next_power_of_2(window_size**2)
        _gather_table_gradient[grad_table.shape](
            gradients.bias, grad_table, programs, heads, window_size, members,
            PART=max(8, 1024 // members), num_warps=max(1, members // 64),
        )  # fmt: skip
    if preparation is None:
        return *gradients.inputs, gradients.norms, grad_table
    return *gradients.inputs, sum_parts(gradients.norms.flatten(1, 3), torch.float32), grad_table


def _launch_backward(common: dict, gradients: Gradients, output_scale: float) -> None:
    heads, tiles, rows = (common[name] for name in ("HEADS", "TILES", "ROWS"))
    output, maps = gradients.output, gradients.maps or (gradients.output, gradients.output)
    batch_size, programs = output.shape[0], gradients.bias.shape[0]
    windows = common["map_height"] * common["map_width"] // common["W"] ** 2
    statistics = gradients.bias.new_empty(2, batch_size, windows, heads, tiles * rows) if tiles > 1 else output
    common = common | {"grad_output_ptr": output, "statistics_ptr": statistics, "windows": windows}
    sums = {"batch_size": batch_size, "output_scale": output_scale, "grad_bias_ptr": gradients.bias}
    if tiles > 1:
        _statistics[windows * tiles * heads, batch_size](**common)
        _backward_bias[tiles * tiles * heads, programs](**common, **sums)
    _backward[tiles * heads, programs](
        **common,
        **sums,
        grad_query_map_ptr=maps[0],
        grad_key_map_ptr=maps[1],
        grad_query_ptr=gradients.inputs[0],
        grad_key_ptr=gradients.inputs[1],
        grad_value_ptr=gradients.inputs[2],
        grad_norm_ptr=gradients.norms,
        MAPS=gradients.maps is not None,
        STAGES=1,
    )
