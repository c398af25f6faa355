# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels for the query stages of the context branch: depthwise 3x3 convolution, exact GELU and the mean over the
map in one pass over a channels-last map `(B, height, width, C)`, and the backward of it in two.

A program walks down a strip: some rows of PAIRS pairs of columns, for a block of channels. A thread keeps the rows
around its place in registers, and both columns of a pair use them, so that a number of the map is loaded and converted
2.5 times, not nine. The rows and columns that strips share come from the cache.
"""

import torch
import triton
import triton.language as tl

from .part_sums import sum_parts

# PAIRS * CHANNELS is two channels for each thread: with four, nine weights and nine sums fill its registers.
CHANNELS = 64
PAIRS = 4
WARPS = 4
# Rows of a strip, and how many rows below the current one are asked for early, for memory answers late.
ROWS = 8
BACKWARD_ROWS = 4
AHEAD = 4
# Programs per block of channels of the pass that sums the gradient of the weight: the order of the sum is fixed.
BACKWARD_PROGRAMS = 28


@triton.jit
def _strip(strip, width, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """First row of a strip, and the first column of each of its pairs."""
    across = tl.cdiv(width, 2 * PAIRS)
    return strip // across * ROWS, (strip % across * PAIRS + tl.arange(0, PAIRS))[:, None] * 2


@triton.jit
def _load_row(map_ptr, y, x, height, width, channel, C: tl.constexpr):
    """Row y of the map from the column before each pair to the one after it; zeros around the map."""
    inside = (channel < C) & (y >= 0) & (y < height)
    here = map_ptr + ((y * width + x) * C + channel)
    return (
        tl.load(here - C, mask=inside & (x > 0) & (x <= width), other=0.0).to(tl.float32),
        tl.load(here, mask=inside & (x < width), other=0.0).to(tl.float32),
        tl.load(here + C, mask=inside & (x + 1 < width), other=0.0).to(tl.float32),
        tl.load(here + 2 * C, mask=inside & (x + 2 < width), other=0.0).to(tl.float32),
    )


@triton.jit
def _load_ahead(
    rows, row: tl.constexpr, map_ptr, top, x, height, width, channel, C: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """
    `rows`, the first of which is the one above the strip, and those that it still lacks up to AHEAD below `row`, or to
    the one below the strip.
    """
    for index in tl.static_range(len(rows), min(row + AHEAD, ROWS) + 2):
        rows += (_load_row(map_ptr, top + index - 1, x, height, width, channel, C),)
    return rows


@triton.jit
def _share(y, height, width):
    """Part that a place of row y has in the mean over the map."""
    return tl.where(y < height, 1.0 / (height * width), 0.0)


@triton.jit
def _load_tap(weight_ptr, tap, channel, C: tl.constexpr):
    return tl.load(weight_ptr + channel * 9 + tap, mask=channel < C, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(weight_ptr, channel, FLIP: tl.constexpr, C: tl.constexpr):
    """The nine taps; flipped, those of the backward of the convolution."""
    weight = ()
    for tap in tl.static_range(9):
        weight += (_load_tap(weight_ptr, 8 - tap if FLIP else tap, channel, C),)
    return weight


@triton.jit
def _convolve(above, here, below, weight, COLUMN: tl.constexpr):
    """Depthwise 3x3 at the first or the second column of the pairs."""
    total = above[COLUMN] * weight[0]
    for shift in tl.static_range(1, 3):
        total += above[COLUMN + shift] * weight[shift]
    for shift in tl.static_range(3):
        total += here[COLUMN + shift] * weight[3 + shift]
    for shift in tl.static_range(3):
        total += below[COLUMN + shift] * weight[6 + shift]
    return total


@triton.jit
def _normal_cdf(x):
    """
    Of the normal distribution, within 1e-7: as near as float32 comes with `0.5 + 0.5 * erf(x / sqrt(2))`, in half the
    instructions. The polynomial is log2 of it for negative x, fitted down to -6.5, and goes on falling beyond.
    """
    z = tl.abs(x)
    power = z * -1.66461473e-06 + 2.70515393e-05
    power = power * z - 0.0001354251
    power = power * z - 0.000241242669
    power = power * z + 0.00717656827
    power = power * z - 0.0525590368
    power = power * z - 0.459192395
    power = power * z - 1.15110648
    tail = tl.exp2(power * z - 1.0)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _depthwise(
    map_ptr,  # (B, height, width, C)
    weight_ptr,  # (C, 1, 3, 3)
    output_ptr,  # (B, height, width, C)
    means_ptr,  # (strips, B, C)
    height, width,
    FEATURES: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The features and what each strip adds to their mean; or, without FEATURES, the convolution's backward alone."""
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    strip, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    map_ptr += batch * height * width * C
    output_ptr += batch * height * width * C
    top, x = _strip(strip, width, ROWS, PAIRS)
    weight = _load_weight(weight_ptr, channel, not FEATURES, C)
    first_sum = tl.zeros((PAIRS, CHANNELS), tl.float32)
    second_sum = tl.zeros((PAIRS, CHANNELS), tl.float32)

    rows = ()
    for row in tl.static_range(ROWS):
        rows = _load_ahead(rows, row, map_ptr, top, x, height, width, channel, C, ROWS, AHEAD)
        y = top + row
        above, here, below = rows[row], rows[row + 1], rows[row + 2]
        first, second = _convolve(above, here, below, weight, 0), _convolve(above, here, below, weight, 1)
        if FEATURES:
            first *= _normal_cdf(first)
            second *= _normal_cdf(second)
            share = _share(y, height, width)
            first_sum += first * share
            second_sum += second * share
        inside = (channel < C) & (y < height)
        at = output_ptr + ((y * width + x) * C + channel)
        tl.store(at, first.to(output_ptr.dtype.element_ty), mask=inside & (x < width))
        tl.store(at + C, second.to(output_ptr.dtype.element_ty), mask=inside & (x + 1 < width))
    if FEATURES:
        sums = tl.where(x < width, first_sum, 0.0) + tl.where(x + 1 < width, second_sum, 0.0)
        means_ptr += (strip * tl.num_programs(2) + batch) * C
        tl.store(means_ptr + channel, tl.sum(sums, axis=0)[None, :], mask=channel < C)


@triton.jit
def _add_products(grad_weight, first, second, above, here, below):
    """To each tap's sums, the gradient times what the tap was multiplied with."""
    total = ()
    for tap in tl.static_range(9):
        row = above if tap < 3 else here if tap < 6 else below
        total += (grad_weight[tap] + first * row[tap % 3] + second * row[tap % 3 + 1],)
    return total


@triton.jit
def _gelu_backward(grad, x):
    """Of exact GELU; the density of the normal distribution is a power of 2 with 1 / sqrt(2 pi) in the exponent."""
    density = tl.exp2(x * x * -0.7213475204444817 - 1.3257480647361594)
    return grad * (_normal_cdf(x) + x * density)


@triton.jit
def _backward(
    grad_features_ptr,  # (B, height, width, C)
    grad_mean_ptr,  # (B, C)
    map_ptr, weight_ptr,
    grad_convolved_ptr,  # (B, height, width, C)
    grad_weight_ptr,  # (programs, C, 9)
    batch_size, height, width,
    C: tl.constexpr, CHANNELS: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Gradient of what the convolution gave, and of the weight, summed over the program's strips."""
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    strips = tl.cdiv(height, ROWS) * tl.cdiv(width, 2 * PAIRS)
    weight = _load_weight(weight_ptr, channel, False, C)
    grad_weight = ()
    for _ in tl.static_range(9):
        grad_weight += (tl.zeros((PAIRS, CHANNELS), tl.float32),)

    for index in range(tl.program_id(1), batch_size * strips, tl.num_programs(1)):
        batch = index // strips + tl.zeros((), tl.int64)
        in_map = batch * height * width * C
        top, x = _strip(index % strips, width, ROWS, PAIRS)
        grad_mean = tl.load(grad_mean_ptr + batch * C + channel, mask=channel < C, other=0.0).to(tl.float32)
        mean_first, mean_second = tl.where(x < width, grad_mean, 0.0), tl.where(x + 1 < width, grad_mean, 0.0)
        rows = ()
        for row in tl.static_range(ROWS):
            rows = _load_ahead(rows, row, map_ptr + in_map, top, x, height, width, channel, C, ROWS, AHEAD)
            y = top + row
            above, here, below = rows[row], rows[row + 1], rows[row + 2]
            at = in_map + ((y * width + x) * C + channel)
            inside = (channel < C) & (y < height) & (x < width)
            inside_too = inside & (x + 1 < width)
            first = tl.load(grad_features_ptr + at, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(grad_features_ptr + at + C, mask=inside_too, other=0.0).to(tl.float32)
            share = _share(y, height, width)
            first = _gelu_backward(first + mean_first * share, _convolve(above, here, below, weight, 0))
            second = _gelu_backward(second + mean_second * share, _convolve(above, here, below, weight, 1))
            tl.store(grad_convolved_ptr + at, first.to(grad_convolved_ptr.dtype.element_ty), mask=inside)
            tl.store(grad_convolved_ptr + at + C, second.to(grad_convolved_ptr.dtype.element_ty), mask=inside_too)
            grad_weight = _add_products(grad_weight, first, second, above, here, below)

    grad_weight_ptr += tl.program_id(1) * (9 * C)
    for tap in tl.static_range(9):
        sums = tl.sum(grad_weight[tap], axis=0)[None, :]
        tl.store(grad_weight_ptr + channel * 9 + tap, sums, mask=channel < C)


def features(token_map: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `(B, height, width, C)` and what each strip adds to their mean, `(strips, B, C)` in float32."""
    batch_size, height, width, channels = token_map.shape
    token_map, weight = token_map.contiguous(), weight.contiguous()
    strips = triton.cdiv(height, ROWS) * triton.cdiv(width, 2 * PAIRS)
    output = torch.empty(token_map.shape, dtype=token_map.dtype, device=token_map.device)
    means = torch.empty((strips, batch_size, channels), dtype=torch.float32, device=token_map.device)
    with torch.cuda.device_of(token_map):
        _depthwise[triton.cdiv(channels, CHANNELS), strips, batch_size](
            token_map, weight, output, means, height, width,
            FEATURES=True, C=channels, CHANNELS=CHANNELS, PAIRS=PAIRS, ROWS=ROWS, AHEAD=AHEAD, num_warps=WARPS,
        )  # fmt: skip
    return output, means


def forward(token_map: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `(B, height, width, C)` and their mean `(B, C)`."""
    output, means = features(token_map, weight)
    strips, *shape = means.shape
    return output, sum_parts(means.view(1, strips, -1), token_map.dtype).view(shape)


def backward(
    grad_features: torch.Tensor, grad_mean: torch.Tensor, token_map: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the map and of the weight."""
    batch_size, height, width, channels = token_map.shape
    token_map, weight = token_map.contiguous(), weight.contiguous()
    strips = triton.cdiv(height, ROWS) * triton.cdiv(width, 2 * PAIRS)
    programs = min(batch_size * triton.cdiv(height, BACKWARD_ROWS) * triton.cdiv(width, 2 * PAIRS), BACKWARD_PROGRAMS)
    blocks = triton.cdiv(channels, CHANNELS)
    grad_convolved = torch.empty(token_map.shape, dtype=token_map.dtype, device=token_map.device)
    grad_map = torch.empty(token_map.shape, dtype=token_map.dtype, device=token_map.device)
    grad_weight = torch.empty((programs, channels, 9), dtype=torch.float32, device=token_map.device)
    with torch.cuda.device_of(token_map):
        _backward[blocks, programs](
            grad_features.contiguous(), grad_mean.contiguous(), token_map, weight, grad_convolved, grad_weight,
            batch_size, height, width,
            C=channels, CHANNELS=CHANNELS, PAIRS=PAIRS, ROWS=BACKWARD_ROWS, AHEAD=AHEAD, num_warps=WARPS,
        )  # fmt: skip
        _depthwise[blocks, strips, batch_size](
            grad_convolved, weight, grad_map, grad_weight, height, width,
            FEATURES=False, C=channels, CHANNELS=CHANNELS, PAIRS=PAIRS, ROWS=ROWS, AHEAD=AHEAD, num_warps=WARPS,
        )  # fmt: skip
    return grad_map, sum_parts(grad_weight.view(1, programs, -1), weight.dtype).view(weight.shape)
