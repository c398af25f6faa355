# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels of window attention, backward. Scores are computed again: nothing but the inputs is kept from the
forward pass. Shape legend in `triton_tiles.py`.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    _add,
    _channels,
    _inner,
    _load,
    _load_rotary,
    _locate,
    _long,
    _mix,
    _prepare,
    _prepare_backward,
    _scale,
    _scores,
    _store,
    _zeros,
)


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
def _of_input(
    grad, grad_map_ptr, input_ptr, norm_ptr, places, tables, token_stride, eps,
    PREPARE: tl.constexpr, ROTARY: tl.constexpr, MAPS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of queries or keys as they were given, and of the norm, from that of what attention took."""
    place, valid, token, inside, row, present = places
    cos_ptr, sin_ptr, channels, pairs = tables
    if MAPS:
        grad = _add(grad, _load(grad_map_ptr, place, valid, WIDTH, channels, HEAD_DIM))
    if PREPARE:
        raw = _load(input_ptr, row, present, token_stride, channels, HEAD_DIM)
        rotary = _load_rotary(cos_ptr, sin_ptr, token, inside, pairs, ROTARY, HEAD_DIM)
        return _prepare_backward(grad, raw, norm_ptr, rotary, eps, channels, ROTARY, HEAD_DIM)
    else:
        return grad, _zeros(channels, 1)


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
        places = (place, at[0], token, inside, row, present)
        tables = (cos_ptr, sin_ptr, channels, pairs)
        grad_query, of_norm = _of_input(
            _scale(grad_query, output_scale * SCALE), grad_query_map_ptr + in_map, query_ptr + in_input, norm_q_ptr,
            places, tables, token_stride, eps, PREPARE, ROTARY, MAPS, WIDTH, HEAD_DIM,
        )  # fmt: skip
        grad_norm_q = _add(grad_norm_q, of_norm)
        _store(grad_query_ptr + in_grad, row, present, WIDTH, grad_query, channels, HEAD_DIM)
        grad_key, of_norm = _of_input(
            _scale(grad_key, output_scale * SCALE), grad_key_map_ptr + in_map, key_ptr + in_input, norm_k_ptr,
            places, tables, token_stride, eps, PREPARE, ROTARY, MAPS, WIDTH, HEAD_DIM,
        )  # fmt: skip
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
