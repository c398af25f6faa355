# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""Triton kernel of window attention, forward. Shape legend in `triton_tiles.py`."""

import triton
import triton.language as tl

from .triton_tiles import (
    _add,
    _channels,
    _load,
    _load_rotary,
    _locate,
    _long,
    _mix,
    _prepare,
    _scale,
    _scores,
    _store,
    _zeros,
)


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
