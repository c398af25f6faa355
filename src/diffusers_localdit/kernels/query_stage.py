# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels for the query stages of the context branch: depthwise 3x3 convolution, exact GELU and the mean over the
map in one pass over a channels-last map `(B, height, width, C)`, and the backward of it in two.

A program serves a square of SIDE x SIDE places and a block of channels; the neighbours that squares share come from
the cache.
"""

import torch
import triton
import triton.language as tl

SIDE = 8
CHANNELS = 64
# Programs per block of channels of the pass that sums the gradient of the weight: the order of the sum is fixed.
BACKWARD_PROGRAMS = 32


@triton.jit
def _places(square, height, width, SIDE: tl.constexpr):
    across = tl.cdiv(width, SIDE)
    place = tl.arange(0, SIDE * SIDE)
    return square // across * SIDE + place // SIDE, square % across * SIDE + place % SIDE


@triton.jit
def _load_neighbour(map_ptr, y, x, tap, height, width, channel, C: tl.constexpr):
    y, x = y + tap // 3 - 1, x + tap % 3 - 1
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    mask = inside[:, None] & (channel < C)[None, :]
    return tl.load(map_ptr + (y * width + x)[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_tap(weight_ptr, tap, channel, C: tl.constexpr):
    return tl.load(weight_ptr + channel * 9 + tap, mask=channel < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _convolve(
    map_ptr, weight_ptr, y, x, height, width, channel, FLIP: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr
):
    """Depthwise 3x3 with zeros around the map; flipped, the backward of itself."""
    total = tl.zeros((SIDE * SIDE, channel.shape[0]), tl.float32)
    for tap in tl.static_range(9):
        neighbour = _load_neighbour(map_ptr, y, x, tap, height, width, channel, C)
        total += neighbour * _load_tap(weight_ptr, 8 - tap if FLIP else tap, channel, C)
    return total


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _depthwise(
    map_ptr,  # (B, height, width, C)
    weight_ptr,  # (C, 1, 3, 3)
    output_ptr,  # (B, height, width, C)
    sums_ptr,  # (squares, B, C)
    height, width,
    FEATURES: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The features and their sums over squares; or, without FEATURES, the backward of the convolution alone."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    square, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    in_map = batch * height * width * C
    y, x = _places(square, height, width, SIDE)
    mask = ((y < height) & (x < width))[:, None] & (channel < C)[None, :]

    output = _convolve(map_ptr + in_map, weight_ptr, y, x, height, width, channel, not FEATURES, C, SIDE)
    if FEATURES:
        output *= _normal_cdf(output)
        sums = tl.sum(tl.where(mask, output, 0.0), axis=0)
        tl.store(sums_ptr + (square * tl.num_programs(2) + batch) * C + channel, sums, mask=channel < C)
    output = output.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + in_map + (y * width + x)[:, None] * C + channel[None, :], output, mask=mask)


@triton.jit
def _backward(
    grad_features_ptr,  # (B, height, width, C)
    grad_mean_ptr,  # (B, C)
    map_ptr, weight_ptr,
    grad_convolved_ptr,  # (B, height, width, C)
    grad_weight_ptr,  # (programs, 9, C)
    batch_size, height, width,
    C: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of what the convolution gave, and of the weight, summed over the program's squares."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    squares = tl.cdiv(height, SIDE) * tl.cdiv(width, SIDE)
    nine = tl.arange(0, 16)[:, None]
    grad_weight = tl.zeros((16, CHANNELS), tl.float32)

    for index in range(tl.program_id(1), batch_size * squares, tl.num_programs(1)):
        batch = index // squares + tl.zeros((), tl.int64)
        in_map = batch * height * width * C
        y, x = _places(index % squares, height, width, SIDE)
        mask = ((y < height) & (x < width))[:, None] & (channel < C)[None, :]
        at = in_map + (y * width + x)[:, None] * C + channel[None, :]

        convolved = _convolve(map_ptr + in_map, weight_ptr, y, x, height, width, channel, False, C, SIDE)
        density = 0.3989422804014327 * tl.exp(-0.5 * convolved * convolved)
        grad_mean = tl.load(grad_mean_ptr + batch * C + channel, mask=channel < C, other=0.0).to(tl.float32)
        grad = tl.load(grad_features_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(mask, grad + grad_mean[None, :] / (height * width), 0.0)
        grad *= _normal_cdf(convolved) + convolved * density
        tl.store(grad_convolved_ptr + at, grad.to(grad_convolved_ptr.dtype.element_ty), mask=mask)
        for tap in tl.static_range(9):
            neighbour = _load_neighbour(map_ptr + in_map, y, x, tap, height, width, channel, C)
            grad_weight += tl.where(nine == tap, tl.sum(grad * neighbour, axis=0)[None, :], 0.0)

    grad_weight_ptr += tl.program_id(1) * (9 * C)
    tl.store(grad_weight_ptr + nine * C + channel[None, :], grad_weight, mask=(nine < 9) & (channel < C)[None, :])


def forward(token_map: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `(B, height, width, C)` and their mean `(B, C)`."""
    batch_size, height, width, channels = token_map.shape
    token_map, weight = token_map.contiguous(), weight.contiguous()
    squares = triton.cdiv(height, SIDE) * triton.cdiv(width, SIDE)
    features = torch.empty(token_map.shape, dtype=token_map.dtype, device=token_map.device)
    sums = torch.empty((squares, batch_size, channels), dtype=torch.float32, device=token_map.device)
    with torch.cuda.device_of(token_map):
        _depthwise[triton.cdiv(channels, CHANNELS), squares, batch_size](
            token_map, weight, features, sums, height, width,
            FEATURES=True, C=channels, CHANNELS=CHANNELS, SIDE=SIDE,
        )  # fmt: skip
    return features, (sums.sum(0) / (height * width)).to(token_map.dtype)


def backward(
    grad_features: torch.Tensor, grad_mean: torch.Tensor, token_map: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the map and of the weight."""
    batch_size, height, width, channels = token_map.shape
    token_map, weight = token_map.contiguous(), weight.contiguous()
    squares = triton.cdiv(height, SIDE) * triton.cdiv(width, SIDE)
    programs = min(batch_size * squares, BACKWARD_PROGRAMS)
    blocks = triton.cdiv(channels, CHANNELS)
    grad_convolved = torch.empty(token_map.shape, dtype=token_map.dtype, device=token_map.device)
    grad_map = torch.empty(token_map.shape, dtype=token_map.dtype, device=token_map.device)
    grad_weight = torch.empty((programs, 9, channels), dtype=torch.float32, device=token_map.device)
    with torch.cuda.device_of(token_map):
        _backward[blocks, programs](
            grad_features.contiguous(), grad_mean.contiguous(), token_map, weight, grad_convolved, grad_weight,
            batch_size, height, width, C=channels, CHANNELS=CHANNELS, SIDE=SIDE,
        )  # fmt: skip
        _depthwise[blocks, squares, batch_size](
            grad_convolved, weight, grad_map, grad_weight, height, width,
            FEATURES=False, C=channels, CHANNELS=CHANNELS, SIDE=SIDE,
        )  # fmt: skip
    return grad_map, grad_weight.sum(0).t().reshape(weight.shape).to(weight.dtype).contiguous()
