# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels for the gate of a query stage where no gradients are wanted: squeeze and excitation of the features'
mean and its product with the pointwise weights in two small passes, for which PyTorch launches six.

Both multiply a matrix by a vector, of which each program does a part; all sums are in float32, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .query_stage import _normal_cdf

CHANNELS = 64  # of the map, for a program
UNITS = 128  # of the squeezed mean, at a time
STRIPS = 64  # at a time
ROWS, TILES = 64, 6  # rows of a tile of the pointwise weights, and tiles of a program
WARPS = 8


@triton.jit
def _squeeze(
    means_ptr,  # (strips, B, C)
    squeeze_ptr,  # (HIDDEN, C)
    squeezed_ptr,  # (blocks of channels, B, HIDDEN)
    strips,
    C: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """What a block of channels adds to the squeezed mean."""
    block, batch = tl.program_id(0), tl.program_id(1)
    channel = (block * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    mean = tl.zeros((STRIPS, CHANNELS), tl.float32)
    for first in range(0, strips, STRIPS):
        strip = (first + tl.arange(0, STRIPS))[:, None]
        at = means_ptr + ((strip * tl.num_programs(1) + batch) * C + channel)
        mean += tl.load(at, mask=(strip < strips) & (channel < C), other=0.0)
    mean = tl.sum(mean, axis=0)[None, :]
    squeezed_ptr += (block * tl.num_programs(1) + batch) * HIDDEN
    for first in tl.static_range(0, HIDDEN, UNITS):
        unit = first + tl.arange(0, UNITS)
        inside = (unit[:, None] < HIDDEN) & (channel < C)
        weight = tl.load(squeeze_ptr + unit[:, None] * C + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(squeezed_ptr + unit, tl.sum(weight * mean, axis=1), mask=unit < HIDDEN)


@triton.jit
def _at(tile, channel, C: tl.constexpr, ROWS: tl.constexpr):
    """Where a tile of the pointwise weights lies, and what of it is there."""
    row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    return row * C + channel[None, :], (row < C) & (channel[None, :] < C)


@triton.jit
def _excite(
    squeezed_ptr,  # (blocks, B, HIDDEN)
    excite_ptr,  # (C, HIDDEN)
    pointwise_ptr,  # (C, C)
    gated_ptr,  # (B, C, C)
    blocks,
    C: tl.constexpr, HIDDEN: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The gate of a block of channels, times the pointwise weights that these channels meet."""
    batch = tl.program_id(2)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tiles = ()  # asked for before the gate is computed: memory answers meanwhile
    for index in tl.static_range(TILES):
        at, inside = _at(tl.program_id(1) * TILES + index, channel, C, ROWS)
        tiles += (tl.load(pointwise_ptr + at, mask=inside, other=0.0),)
    block = tl.arange(0, BLOCKS)[:, None]
    excited = tl.zeros((CHANNELS, UNITS), tl.float32)
    for first in tl.static_range(0, HIDDEN, UNITS):
        unit = (first + tl.arange(0, UNITS))[None, :]
        shares = squeezed_ptr + ((block * tl.num_programs(2) + batch) * HIDDEN + unit)
        shares = tl.load(shares, mask=(block < blocks) & (unit < HIDDEN), other=0.0)  # (BLOCKS, UNITS)
        squeezed = tl.sum(shares, axis=0)[None, :]
        known = (channel[:, None] < C) & (unit < HIDDEN)
        weight = tl.load(excite_ptr + channel[:, None] * HIDDEN + unit, mask=known, other=0.0).to(tl.float32)
        excited += weight * squeezed * _normal_cdf(squeezed)
    gate = tl.sigmoid(tl.sum(excited, axis=1))[None, :]
    gated_ptr += batch.to(tl.int64) * (C * C)
    for index in tl.static_range(TILES):
        at, inside = _at(tl.program_id(1) * TILES + index, channel, C, ROWS)
        gated = tiles[index].to(tl.float32) * gate
        tl.store(gated_ptr + at, gated.to(gated_ptr.dtype.element_ty), mask=inside)


def gated_weight(
    means: torch.Tensor, squeeze: torch.Tensor, excite: torch.Tensor, pointwise: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """
    The pointwise weights `(B, C, C)` of each sample with its gate in them.

    Args:
        means (`torch.Tensor` of shape `(strips, B, C)`): What each strip of the map adds to the features' mean.
        squeeze, excite, pointwise (`torch.Tensor` of shapes `(hidden, C)`, `(C, hidden)`, `(C, C)`): Weights.
        dtype (`torch.dtype`): Of the result.
    """
    strips, batch_size, channels = means.shape
    hidden = squeeze.shape[0]
    blocks = triton.cdiv(channels, CHANNELS)
    squeezed = torch.empty((blocks, batch_size, hidden), dtype=torch.float32, device=means.device)
    gated = torch.empty((batch_size, channels, channels), dtype=dtype, device=means.device)
    sizes = {"C": channels, "HIDDEN": hidden, "CHANNELS": CHANNELS, "UNITS": UNITS, "num_warps": WARPS}
    with torch.cuda.device_of(means):
        _squeeze[blocks, batch_size](means, squeeze.contiguous(), squeezed, strips, STRIPS=STRIPS, **sizes)
        _excite[blocks, triton.cdiv(channels, ROWS * TILES), batch_size](
            squeezed, excite.contiguous(), pointwise.contiguous(), gated, blocks,
            BLOCKS=triton.next_power_of_2(blocks), ROWS=ROWS, TILES=TILES, **sizes,
        )  # fmt: skip
    return gated
