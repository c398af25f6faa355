# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
What the Triton kernels of window attention are made of: tiles of a window's members, norm and rotary embedding,
scores.

Shape legend: B batch, L tokens of the image, M = Hp * Wp places of the padded, rolled map, w window size, n windows,
C = HEADS * HEAD_DIM. A tile holds ROWS members of a window, at most 64 (fewer in float32); a window has TILES of them.
The channels of a tile are cut into blocks of powers of two (72 into 64 + 16, of which 8 lie idle), because padding 72
to 128 would cost half the arithmetic: a tile is a tuple of one or two blocks.
"""

import triton
import triton.language as tl

from .. import transformer_localdit

LOG2_E = tl.constexpr(1.4426950408889634)
MASK_VALUE = tl.constexpr(transformer_localdit.MASK_VALUE)


# Tiles


@triton.jit
def _long(number):
    return number + tl.zeros((), tl.int64)  # serves also where the compiler made a constant of a 1


@triton.jit
def _channels(MAIN: tl.constexpr, REST: tl.constexpr):
    """Channel of each column, per block."""
    if REST == 0:
        return (tl.arange(0, MAIN),)
    else:
        return (tl.arange(0, MAIN), MAIN + tl.arange(0, REST))


@triton.jit
def _locate(window, tile, geometry, PREPARE: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
    """
    The members of a window in a tile: (which exist, row, column, region), place on the map, token, which are no
    padding, and in which rows of the inputs they stand.
    """
    map_to_token_ptr, token_to_window_ptr, tokens, map_height, map_width = geometry
    member = tile * ROWS + tl.arange(0, ROWS)
    valid = member < W * W
    y, x = member // W, member % W
    top, left = window // (map_width // W) * W, window % (map_width // W) * W
    place = (top + y) * map_width + left + x
    token = tl.load(map_to_token_ptr + place, mask=valid, other=tokens).to(tl.int32)
    inside = token < tokens
    # The roll starts anew at token 0: w - shift rows and columns into its window, or 0 without a shift.
    seam = tl.load(token_to_window_ptr).to(tl.int32) % (W * W) // W
    past_y = (seam > 0) & (top == map_height - W) & (y >= seam)
    past_x = (seam > 0) & (left == map_width - W) & (x >= seam)
    at = (valid, y, x, past_y.to(tl.int32) * 2 + past_x.to(tl.int32))
    if PREPARE:
        return at, place, token, inside, token, inside
    else:
        return at, place, token, inside, place, valid


@triton.jit
def _load_block(pointer, row, present, stride, channel, WIDTH: tl.constexpr):
    mask = present[:, None] & (channel < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _load(pointer, row, present, stride, channels, WIDTH: tl.constexpr):
    return tl.tuple([_load_block(pointer, row, present, stride, channel, WIDTH) for channel in channels])


@triton.jit
def _store(pointer, row, present, stride, tile, channels, WIDTH: tl.constexpr):
    for i in tl.static_range(len(channels)):
        mask = present[:, None] & (channels[i] < WIDTH)[None, :]
        block = tile[i].to(pointer.dtype.element_ty)
        tl.store(pointer + row[:, None] * stride + channels[i][None, :], block, mask=mask)


@triton.jit
def _float(tile):
    return tl.tuple([block.to(tl.float32) for block in tile])


@triton.jit
def _scale(tile, factor):
    return tl.tuple([block * factor for block in tile])


@triton.jit
def _add(a, b):
    total = (a[0] + b[0],)
    for i in tl.static_range(1, len(a)):
        total += (a[i] + b[i],)
    return total


@triton.jit
def _multiply(a, b):
    product = (a[0] * b[0],)
    for i in tl.static_range(1, len(a)):
        product += (a[i] * b[i],)
    return product


@triton.jit
def _sum_channels(tile):
    total = tl.sum(tile[0], axis=1)
    for i in tl.static_range(1, len(tile)):
        total += tl.sum(tile[i], axis=1)
    return total[:, None]


@triton.jit
def _sum_rows(tile):
    return tl.tuple([tl.sum(block, axis=0)[None, :] for block in tile])


@triton.jit
def _zeros(channels, ROWS: tl.constexpr):
    return tl.tuple([tl.zeros((ROWS, channel.shape[0]), tl.float32) for channel in channels])


@triton.jit
def _dot(a, b, DOT: tl.constexpr):
    # DOT is the operands' own type, or float32 under the interpreter, which would multiply bfloat16 as integers.
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="ieee")


@triton.jit
def _inner(a, b, DOT: tl.constexpr):
    """a b^T: products of the rows of two tiles."""
    total = _dot(a[0], tl.trans(b[0]), DOT)
    for i in tl.static_range(1, len(a)):
        total += _dot(a[i], tl.trans(b[i]), DOT)
    return total


@triton.jit
def _mix(weights, tile, DOT: tl.constexpr):
    """Sums of the rows of a tile by the rows of `weights`."""
    return tl.tuple([_dot(weights.to(block.dtype), block, DOT) for block in tile])


# Normalisation and rotary embedding


@triton.jit
def _load_weight(pointer, channels, HEAD_DIM: tl.constexpr):
    return tl.tuple(
        [
            tl.load(pointer + channel, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
            for channel in channels
        ]
    )


@triton.jit
def _normalize(x, eps, HEAD_DIM: tl.constexpr):
    """x / rms(x) in float32, and 1 / rms(x)."""
    x = _float(x)
    factor = tl.rsqrt(_sum_channels(_multiply(x, x)) / HEAD_DIM + eps)
    return _scale(x, factor), factor


@triton.jit
def _rotate_block(x, cos, sin):
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), x.shape)


@triton.jit
def _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Cosines and sines of a tile's tokens, the same for all heads."""
    if ROTARY:
        cos = _load(cos_ptr, token, inside, HEAD_DIM // 2, pairs, HEAD_DIM // 2)
        return cos, _load(sin_ptr, token, inside, HEAD_DIM // 2, pairs, HEAD_DIM // 2)
    else:
        return (), ()


@triton.jit
def _rotate(x, rotary, sense):
    """Turns the interleaved pairs of a tile; back where `sense` is -1."""
    cos, sin = rotary
    turned = (_rotate_block(x[0], cos[0], sin[0] * sense),)
    for i in tl.static_range(1, len(x)):
        turned += (_rotate_block(x[i], cos[i], sin[i] * sense),)
    return turned


@triton.jit
def _prepare(
    x, weight_ptr, rotary, eps, channels, PREPARE: tl.constexpr, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Queries or keys as attention takes them: normalised and turned, unless they are so already."""
    if PREPARE:
        dtype = x[0].dtype
        x, _ = _normalize(x, eps, HEAD_DIM)
        x = _multiply(x, _load_weight(weight_ptr, channels, HEAD_DIM))
        if ROTARY:
            x = _rotate(x, rotary, 1.0)
        x = tl.tuple([block.to(dtype) for block in x])
    return x


@triton.jit
def _prepare_backward(grad, x, weight_ptr, rotary, eps, channels, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Gradients of x and, summed over the tile, of the weight, from that of what `_prepare` gave."""
    if ROTARY:
        grad = _rotate(grad, rotary, -1.0)
    normed, factor = _normalize(x, eps, HEAD_DIM)
    grad_weight = _sum_rows(_multiply(grad, normed))
    grad = _multiply(grad, _load_weight(weight_ptr, channels, HEAD_DIM))
    along = _sum_channels(_multiply(grad, normed)) / HEAD_DIM
    return _scale(_add(grad, _scale(normed, -along)), factor), grad_weight


# Attention of a tile of queries to a tile of keys


@triton.jit
def _scores(
    query, key, q_at, k_at, table_ptr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, W: tl.constexpr, DOT: tl.constexpr
):
    """Scores with position bias and region mask, in units of log2 so that exp2 serves."""
    q_valid, q_y, q_x, q_region = q_at
    k_valid, k_y, k_x, k_region = k_at
    entry = (q_y[:, None] - k_y[None, :] + W - 1) * (2 * W - 1) + q_x[:, None] - k_x[None, :] + W - 1
    bias = tl.load(table_ptr + entry * HEADS, mask=q_valid[:, None] & k_valid[None, :], other=0.0).to(tl.float32)
    bias = tl.where(q_region[:, None] == k_region[None, :], bias, bias + MASK_VALUE)
    scores = _inner(query, key, DOT) * (HEAD_DIM**-0.5 * LOG2_E) + bias * LOG2_E
    return tl.where(k_valid[None, :], scores, float("-inf"))
