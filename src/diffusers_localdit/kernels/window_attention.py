# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels of shifted-window attention: each tensor is read once and written once. For the sizes of the released
model in half precision the CUDA kernels of `window4.py` take their place.

A program serves one head of one window. It finds its tokens through the index map (shift and padding are in it),
normalises and turns queries and keys in registers, attends, and writes to the tokens' own places. `reference.py` says
the same in PyTorch and is what these kernels are tested against.

Shape legend: B batch, L tokens of the image, M = Hp * Wp places of the padded, rolled map, w window size, n windows,
C = HEADS * HEAD_DIM. A tile holds ROWS members of a window, at most 64 (fewer in float32); a window has TILES of them.
The channels of a tile are cut into blocks of powers of two (72 into 64 + 16, of which 8 lie idle), because padding 72
to 128 would cost half the arithmetic: a tile is a tuple of one or two blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import window4

LOG2_E = tl.constexpr(1.4426950408889634)
MASK_VALUE = tl.constexpr(-10000.0)

# Heads that a program of the forward pass serves one after the other: it finds its tokens and loads the rotary table
# once, and while it computes one head, what the next one needs is on its way.
FORWARD_HEADS = 8
# Programs per head of a backward pass (warps in the CUDA kernels). Each sums its windows' share of the parameters'
# gradients in registers, in a fixed order, and writes it once: the result does not depend on the machine.
BACKWARD_PROGRAMS = 64


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


@triton.jit
def _forward(
    query_ptr, key_ptr, value_ptr,  # (B, L, C), or (B, M, C) without PREPARE
    norm_q_ptr, norm_k_ptr,  # (HEAD_DIM,)
    cos_ptr, sin_ptr,  # (L, HEAD_DIM / 2)
    table_ptr,  # ((2w-1)^2, HEADS)
    map_to_token_ptr, token_to_window_ptr,  # (M,), (L,)
    residual_ptr, output_ptr,  # (B, L, C)
    query_map_ptr, key_map_ptr,  # (B, M, C)
    batch_stride, token_stride, tokens, map_height, map_width, eps, output_scale,
    PREPARE: tl.constexpr, ROTARY: tl.constexpr, MAPS: tl.constexpr, RESIDUAL: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, W: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, DOT: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of queries in GROUP heads, one after the other."""
    GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    # Groups of heads vary fastest: neighbours in memory run at the same time.
    first_head = tl.program_id(0) % GROUPS * GROUP
    tile = tl.program_id(0) // GROUPS % TILES
    window = tl.program_id(0) // (GROUPS * TILES)
    batch = _long(tl.program_id(1))
    query_ptr += batch * batch_stride
    key_ptr += batch * batch_stride
    value_ptr += batch * batch_stride
    residual_ptr += batch * tokens * WIDTH
    output_ptr += batch * tokens * WIDTH
    query_map_ptr += batch * map_height * map_width * WIDTH
    key_map_ptr += batch * map_height * map_width * WIDTH
    geometry = (map_to_token_ptr, token_to_window_ptr, tokens, map_height, map_width)
    channels, pairs = _channels(MAIN, REST), _channels(MAIN // 2, REST // 2)

    q_at, place, token, inside, row, present = _locate(window, tile, geometry, PREPARE, W, ROWS)
    rotary = _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY, HEAD_DIM)
    for head in tl.range(first_head, min(first_head + GROUP, HEADS), num_stages=STAGES):
        at_head = head * HEAD_DIM
        query = _load(query_ptr + at_head, row, present, token_stride, channels, HEAD_DIM)
        query = _prepare(query, norm_q_ptr, rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)
        if MAPS:
            _store(query_map_ptr + at_head, place, q_at[0], WIDTH, query, channels, HEAD_DIM)

        row_max = tl.full((ROWS,), float("-inf"), tl.float32)
        row_sum = tl.zeros((ROWS,), tl.float32)
        output = _zeros(channels, ROWS)
        for key_tile in range(TILES):
            if TILES == 1:
                k_at, k_place, k_row, k_present, k_rotary = q_at, place, row, present, rotary
            else:
                k_at, k_place, k_token, k_inside, k_row, k_present = _locate(
                    window, key_tile, geometry, PREPARE, W, ROWS
                )
                k_rotary = _load_rotary(cos_ptr, sin_ptr, k_token, k_inside, pairs, ROTARY, HEAD_DIM)
            key = _load(key_ptr + at_head, k_row, k_present, token_stride, channels, HEAD_DIM)
            value = _load(value_ptr + at_head, k_row, k_present, token_stride, channels, HEAD_DIM)
            key = _prepare(key, norm_k_ptr, k_rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)
            if MAPS:
                _store(key_map_ptr + at_head, k_place, k_at[0] & (key_tile == tile), WIDTH, key, channels, HEAD_DIM)

            scores = _scores(query, key, q_at, k_at, table_ptr + head, HEADS, HEAD_DIM, W, DOT)
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_sum = row_sum * shrink + tl.sum(weights, axis=1)
            output = _add(_scale(output, shrink[:, None]), _mix(weights, value, DOT))
            row_max = new_max

        output = _scale(output, (output_scale / row_sum)[:, None])
        if RESIDUAL:
            output = _add(output, _load(residual_ptr + at_head, token, inside, WIDTH, channels, HEAD_DIM))
        _store(output_ptr + at_head, token, inside, WIDTH, output, channels, HEAD_DIM)


# Backward. Scores are computed again: nothing but the inputs is kept from the forward pass.


@triton.jit
def _statistics(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, norm_q_ptr, norm_k_ptr, cos_ptr, sin_ptr, table_ptr,
    map_to_token_ptr, token_to_window_ptr,
    statistics_ptr,  # (2, B, n, HEADS, TILES * ROWS)
    batch_stride, token_stride, tokens, map_height, map_width, windows, eps,
    PREPARE: tl.constexpr, ROTARY: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, W: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """
    Of each query, where a window has several tiles: log2 of the sum of its softmax, and the average of the weights'
    gradients, which the gradient of the softmax takes off.
    """
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % TILES
    window = tl.program_id(0) // (HEADS * TILES)
    batch = _long(tl.program_id(1))

    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    in_input = batch * batch_stride + head * HEAD_DIM
    in_output = batch * tokens * WIDTH + head * HEAD_DIM
    geometry = (map_to_token_ptr, token_to_window_ptr, tokens, map_height, map_width)
    channels, pairs = _channels(MAIN, REST), _channels(MAIN // 2, REST // 2)

    q_at, _, token, inside, row, present = _locate(window, tile, geometry, PREPARE, W, ROWS)
    query = _load(query_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
    rotary = _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY, HEAD_DIM)
    query = _prepare(query, norm_q_ptr, rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)
    grad_output = _load(grad_output_ptr + in_output, token, inside, WIDTH, channels, HEAD_DIM)

    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    average = tl.zeros((ROWS,), tl.float32)
    for key_tile in range(TILES):
        k_at, _, token, inside, row, present = _locate(window, key_tile, geometry, PREPARE, W, ROWS)
        key = _load(key_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
        rotary = _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY, HEAD_DIM)
        key = _prepare(key, norm_k_ptr, rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)
        value = _load(value_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
        scores = _scores(query, key, q_at, k_at, table_ptr + head, HEADS, HEAD_DIM, W, DOT)
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        average = average * shrink + tl.sum(weights * _inner(grad_output, value, DOT), axis=1)
        row_max = new_max

    statistics_ptr += ((batch * windows + window) * HEADS + head) * (TILES * ROWS) + tile * ROWS + tl.arange(0, ROWS)
    tl.store(statistics_ptr, row_max + tl.log2(row_sum))
    tl.store(statistics_ptr + tl.num_programs(1) * windows * (HEADS * TILES * ROWS), average / row_sum)


@triton.jit
def _pair_gradient(
    query, key, value, grad_output, q_at, k_at, statistics_ptr, averages, q_tile, table_ptr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Softmax weights of a tile of queries over a tile of keys, and the gradient of their scores."""
    statistics_ptr += q_tile * ROWS + tl.arange(0, ROWS)
    scores = _scores(query, key, q_at, k_at, table_ptr, HEADS, HEAD_DIM, W, DOT)
    weights = tl.exp2(scores - tl.load(statistics_ptr)[:, None])
    average = tl.load(statistics_ptr + averages)[:, None]
    return weights, weights * (_inner(grad_output, value, DOT) - average)


@triton.jit
def _backward(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, norm_q_ptr, norm_k_ptr, cos_ptr, sin_ptr, table_ptr,
    map_to_token_ptr, token_to_window_ptr,
    grad_query_map_ptr, grad_key_map_ptr,  # (B, M, C)
    statistics_ptr,  # (2, B, n, HEADS, TILES * ROWS), where there are several tiles
    grad_query_ptr, grad_key_ptr, grad_value_ptr,  # (B, L, C), or (B, M, C) without PREPARE
    grad_norm_ptr,  # (2, programs, HEADS, TILES, HEAD_DIM)
    grad_bias_ptr,  # (programs, HEADS, w*w, w*w), where there is one tile
    batch_size, batch_stride, token_stride, tokens, map_height, map_width, windows, eps, output_scale,
    PREPARE: tl.constexpr, ROTARY: tl.constexpr, MAPS: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, W: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile in each of the program's windows: as queries, and as keys and values."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS

    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = HEAD_DIM**-0.5
    geometry = (map_to_token_ptr, token_to_window_ptr, tokens, map_height, map_width)
    channels, pairs = _channels(MAIN, REST), _channels(MAIN // 2, REST // 2)
    grad_norm_q, grad_norm_k = _zeros(channels, 1), _zeros(channels, 1)
    grad_bias = tl.zeros((ROWS, ROWS), tl.float32)

    for index in tl.range(tl.program_id(1), batch_size * windows, tl.num_programs(1), num_stages=STAGES):
        window = index % windows
        batch = _long(index // windows)
        in_input = batch * batch_stride + head * HEAD_DIM
        in_output = batch * tokens * WIDTH + head * HEAD_DIM
        in_map = batch * map_height * map_width * WIDTH + head * HEAD_DIM

        at, place, token, inside, row, present = _locate(window, tile, geometry, PREPARE, W, ROWS)
        query = _load(query_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
        key = _load(key_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
        value = _load(value_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
        grad_output = _load(grad_output_ptr + in_output, token, inside, WIDTH, channels, HEAD_DIM)
        rotary = _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY, HEAD_DIM)
        query = _prepare(query, norm_q_ptr, rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)
        key = _prepare(key, norm_k_ptr, rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)

        if TILES == 1:
            scores = _scores(query, key, at, at, table_ptr + head, HEADS, HEAD_DIM, W, DOT)
            weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
            weights /= tl.sum(weights, axis=1)[:, None]
            grad_weights = _inner(grad_output, value, DOT)
            grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, axis=1)[:, None])
            grad_bias += grad_scores
            grad_query = _mix(grad_scores, key, DOT)
            grad_key = _mix(tl.trans(grad_scores), query, DOT)
            grad_value = _mix(tl.trans(weights), grad_output, DOT)
        else:
            statistics = statistics_ptr + (_long(index) * HEADS + head) * (TILES * ROWS)
            averages = _long(batch_size) * windows * (HEADS * TILES * ROWS)
            grad_query, grad_key, grad_value = _zeros(channels, ROWS), _zeros(channels, ROWS), _zeros(channels, ROWS)
            for other in range(TILES):
                o_at, _, o_token, o_inside, o_row, o_present = _locate(window, other, geometry, PREPARE, W, ROWS)
                o_query = _load(query_ptr + in_input, o_row, o_present, token_stride, channels, HEAD_DIM)
                o_rotary = _load_rotary(cos_ptr, sin_ptr, o_token, o_inside, pairs, ROTARY, HEAD_DIM)
                o_query = _prepare(o_query, norm_q_ptr, o_rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)
                o_key = _load(key_ptr + in_input, o_row, o_present, token_stride, channels, HEAD_DIM)
                o_key = _prepare(o_key, norm_k_ptr, o_rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)
                o_value = _load(value_ptr + in_input, o_row, o_present, token_stride, channels, HEAD_DIM)
                o_grad = _load(grad_output_ptr + in_output, o_token, o_inside, WIDTH, channels, HEAD_DIM)
                weights, grad_scores = _pair_gradient(
                    query, o_key, o_value, grad_output, at, o_at, statistics, averages, tile, table_ptr + head,
                    HEADS, HEAD_DIM, W, ROWS, DOT,
                )  # fmt: skip
                grad_query = _add(grad_query, _mix(grad_scores, o_key, DOT))
                weights, grad_scores = _pair_gradient(
                    o_query, key, value, o_grad, o_at, at, statistics, averages, other, table_ptr + head,
                    HEADS, HEAD_DIM, W, ROWS, DOT,
                )  # fmt: skip
                grad_key = _add(grad_key, _mix(tl.trans(grad_scores), o_query, DOT))
                grad_value = _add(grad_value, _mix(tl.trans(weights), o_grad, DOT))

        # One gradient after the other, from inputs that are loaded again (out of the cache): registers are scarce.
        in_grad = in_output if PREPARE else in_map
        _store(grad_value_ptr + in_grad, row, present, WIDTH, _scale(grad_value, output_scale), channels, HEAD_DIM)
        grad_query = _scale(grad_query, output_scale * SCALE)
        if MAPS:
            of_map = _load(grad_query_map_ptr + in_map, place, at[0], WIDTH, channels, HEAD_DIM)
            grad_query = _add(grad_query, of_map)
        if PREPARE:
            raw = _load(query_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
            rotary = _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY, HEAD_DIM)
            grad_query, of_norm = _prepare_backward(
                grad_query, raw, norm_q_ptr, rotary, eps, channels, ROTARY, HEAD_DIM
            )
            grad_norm_q = _add(grad_norm_q, of_norm)
        _store(grad_query_ptr + in_grad, row, present, WIDTH, grad_query, channels, HEAD_DIM)
        grad_key = _scale(grad_key, output_scale * SCALE)
        if MAPS:
            of_map = _load(grad_key_map_ptr + in_map, place, at[0], WIDTH, channels, HEAD_DIM)
            grad_key = _add(grad_key, of_map)
        if PREPARE:
            raw = _load(key_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
            rotary = _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY, HEAD_DIM)
            grad_key, of_norm = _prepare_backward(grad_key, raw, norm_k_ptr, rotary, eps, channels, ROTARY, HEAD_DIM)
            grad_norm_k = _add(grad_norm_k, of_norm)
        _store(grad_key_ptr + in_grad, row, present, WIDTH, grad_key, channels, HEAD_DIM)

    if PREPARE:
        part = (tl.program_id(1) * HEADS + head) * TILES + tile + tl.arange(0, 1)
        parts = tl.num_programs(1) * HEADS * TILES
        _store(grad_norm_ptr, part, part >= 0, HEAD_DIM, grad_norm_q, channels, HEAD_DIM)
        _store(grad_norm_ptr, parts + part, part >= 0, HEAD_DIM, grad_norm_k, channels, HEAD_DIM)
    if TILES == 1:
        _store_bias_gradient(grad_bias_ptr, head, 0, 0, grad_bias * output_scale, HEADS, W, ROWS)


@triton.jit
def _store_bias_gradient(
    pointer, head, q_tile, k_tile, gradient, HEADS: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr
):
    query = q_tile * ROWS + tl.arange(0, ROWS)
    key = k_tile * ROWS + tl.arange(0, ROWS)
    mask = (query < W * W)[:, None] & (key < W * W)[None, :]
    pointer += (tl.program_id(1) * HEADS + head) * (W * W * W * W)
    tl.store(pointer + query[:, None] * (W * W) + key[None, :], gradient, mask=mask)


@triton.jit
def _backward_bias(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, norm_q_ptr, norm_k_ptr, cos_ptr, sin_ptr, table_ptr,
    map_to_token_ptr, token_to_window_ptr,
    statistics_ptr,  # (2, B, n, HEADS, TILES * ROWS)
    grad_bias_ptr,  # (programs, HEADS, w*w, w*w)
    batch_size, batch_stride, token_stride, tokens, map_height, map_width, windows, eps, output_scale,
    PREPARE: tl.constexpr, ROTARY: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, W: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradient of the position bias for one pair of tiles, summed over the program's windows."""
    head = tl.program_id(0) % HEADS
    q_tile = tl.program_id(0) // HEADS % TILES
    k_tile = tl.program_id(0) // (HEADS * TILES)

    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    geometry = (map_to_token_ptr, token_to_window_ptr, tokens, map_height, map_width)
    channels, pairs = _channels(MAIN, REST), _channels(MAIN // 2, REST // 2)
    averages = _long(batch_size) * windows * (HEADS * TILES * ROWS)
    grad_bias = tl.zeros((ROWS, ROWS), tl.float32)

    for index in range(tl.program_id(1), batch_size * windows, tl.num_programs(1)):
        window = index % windows
        batch = _long(index // windows)
        in_input = batch * batch_stride + head * HEAD_DIM
        in_output = batch * tokens * WIDTH + head * HEAD_DIM

        q_at, _, token, inside, row, present = _locate(window, q_tile, geometry, PREPARE, W, ROWS)
        query = _load(query_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
        rotary = _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY, HEAD_DIM)
        query = _prepare(query, norm_q_ptr, rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)
        grad_output = _load(grad_output_ptr + in_output, token, inside, WIDTH, channels, HEAD_DIM)
        k_at, _, token, inside, row, present = _locate(window, k_tile, geometry, PREPARE, W, ROWS)
        key = _load(key_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
        rotary = _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY, HEAD_DIM)
        key = _prepare(key, norm_k_ptr, rotary, eps, channels, PREPARE, ROTARY, HEAD_DIM)
        value = _load(value_ptr + in_input, row, present, token_stride, channels, HEAD_DIM)
        statistics = statistics_ptr + (_long(index) * HEADS + head) * (TILES * ROWS)
        _, grad_scores = _pair_gradient(
            query, key, value, grad_output, q_at, k_at, statistics, averages, q_tile, table_ptr + head,
            HEADS, HEAD_DIM, W, ROWS, DOT,
        )  # fmt: skip
        grad_bias += grad_scores
    _store_bias_gradient(grad_bias_ptr, head, q_tile, k_tile, grad_bias * output_scale, HEADS, W, ROWS)


@triton.jit
def _gather_table_gradient(
    grad_bias_ptr,  # (programs, HEADS, w*w, w*w)
    grad_table_ptr,  # ((2w-1)^2, HEADS)
    programs, HEADS: tl.constexpr, W: tl.constexpr, MEMBERS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Sums, for one entry of the table, over programs and the pairs of places that read it: in order, no atomics."""
    entry, head = tl.program_id(0), tl.program_id(1)
    query = tl.arange(0, MEMBERS)
    y = query // W - (entry // (2 * W - 1) - W + 1)  # of the key at this offset
    x = query % W - (entry % (2 * W - 1) - W + 1)
    reads = (query < W * W) & (y >= 0) & (y < W) & (x >= 0) & (x < W)
    pair = (head * W * W + query) * W * W + y * W + x
    total = tl.zeros((PART, MEMBERS), tl.float32)
    for first in range(0, programs, PART):
        program = first + tl.arange(0, PART)
        place = _long(program)[:, None] * (HEADS * W * W * W * W) + pair[None, :]
        total += tl.load(grad_bias_ptr + place, mask=(program < programs)[:, None] & reads[None, :], other=0.0)
    tl.store(grad_table_ptr + entry * HEADS + head, tl.sum(tl.sum(total, axis=1)))


# Launching


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Attends within windows.

    Returns:
        `output_scale` times the attention, plus `residual`, `(B, L, C)`; and with `with_maps` the prepared queries and
        keys on the map, `(B, Hp, Wp, C)`, otherwise two empty tensors.
    """
    common = _common_arguments(query, key, value, preparation, bias_table, map_to_token, token_to_window, window_size)
    batch_size, _, width = query.shape
    windows = map_to_token.numel() // window_size**2
    output = query.new_empty(batch_size, common["tokens"], width)
    map_shape = (batch_size, *map_to_token.shape, width) if with_maps else (0,)
    query_map, key_map = query.new_empty(map_shape), query.new_empty(map_shape)
    residual = None if residual is None else residual.contiguous()
    with torch.cuda.device_of(query):
        if window4.serves(common, residual):
            window4.forward(common, residual, output, query_map, key_map, output_scale)
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
    Gradients of query, key, value, of both norms' weights `(2, head_dim)` in float32 (zeros without a preparation) and
    of the bias table.
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

    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    grad_norm = empty_float(2, programs, heads, tiles, head_dim)
    grad_bias = empty_float(programs, heads, window_size**2, window_size**2)
    with torch.cuda.device_of(query):
        if window4.serves(common, grad_output, *(grad_maps or ())):
            window4.backward(common, grad_output, grad_maps, grads, grad_norm, grad_bias, output_scale)
        else:
            _launch_backward(common, grad_output, grad_maps, grads, grad_norm, grad_bias, output_scale)
        grad_table = torch.empty(bias_table.shape, dtype=bias_table.dtype, device=bias_table.device)
        _gather_table_gradient[grad_table.shape](
            grad_bias, grad_table, programs, heads, window_size, triton.next_power_of_2(window_size**2), PART=8
        )
    return *grads, grad_norm.sum((1, 2, 3)), grad_table


def _launch_backward(
    common: dict,
    grad_output: torch.Tensor,
    grad_maps: tuple[torch.Tensor, torch.Tensor] | None,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_norm: torch.Tensor,
    grad_bias: torch.Tensor,
    output_scale: float,
) -> None:
    heads, tiles, rows = (common[name] for name in ("HEADS", "TILES", "ROWS"))
    batch_size, programs = grad_output.shape[0], grad_bias.shape[0]
    windows = common["map_height"] * common["map_width"] // common["W"] ** 2
    statistics = grad_bias.new_empty(2, batch_size, windows, heads, tiles * rows) if tiles > 1 else grad_output
    common = common | {"grad_output_ptr": grad_output, "statistics_ptr": statistics, "windows": windows}
    sums = {"batch_size": batch_size, "output_scale": output_scale, "grad_bias_ptr": grad_bias}
    if tiles > 1:
        _statistics[windows * tiles * heads, batch_size](**common)
        _backward_bias[tiles * tiles * heads, programs](**common, **sums)
    _backward[tiles * heads, programs](
        **common,
        **sums,
        grad_query_map_ptr=grad_output if grad_maps is None else grad_maps[0],
        grad_key_map_ptr=grad_output if grad_maps is None else grad_maps[1],
        grad_query_ptr=grads[0],
        grad_key_ptr=grads[1],
        grad_value_ptr=grads[2],
        grad_norm_ptr=grad_norm,
        MAPS=grad_maps is not None,
        STAGES=1,
    )
