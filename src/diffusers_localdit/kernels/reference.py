# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
What the kernels compute, in PyTorch: same arguments, same results, no regard to speed. The kernels are tested against
these functions, and these against the processor of `transformer_localdit.py`.

Shape legend: B batch, L tokens of the image, Hp x Wp its map, padded and rolled, w window size, C = heads * head_dim.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

from ..transformer_localdit import MASK_VALUE


def to_map(tokens: torch.Tensor, map_to_token: torch.Tensor) -> torch.Tensor:
    """Tokens `(B, L, C)` on the map `(B, Hp, Wp, C)`; padding is zero."""
    return F.pad(tokens, (0, 0, 0, 1))[:, map_to_token]


def to_tokens(token_map: torch.Tensor, map_to_token: torch.Tensor, length: int) -> torch.Tensor:
    """The way back: each token stands on the map once, and padding comes last in order."""
    return token_map.flatten(1, 2)[:, map_to_token.flatten().argsort(stable=True)[:length]]


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each head of `(B, L, heads, head_dim)`."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    """Turns the interleaved pairs (a, b) of each head of `(B, L, heads, head_dim)`."""
    if cos is None:
        return x
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def regions(map_to_token: torch.Tensor, token_to_window: torch.Tensor, window_size: int) -> torch.Tensor:
    """Labels `(Hp, Wp)` of what lay together before the roll, where a window's members may not have."""
    height, width = map_to_token.shape
    seam = token_to_window[0] % window_size**2 // window_size  # rows of a window above token 0, where the roll begins
    row = torch.arange(height, device=map_to_token.device)
    column = torch.arange(width, device=map_to_token.device)
    past_row = (seam > 0) & (row >= height - window_size + seam)
    past_column = (seam > 0) & (column >= width - window_size + seam)
    return past_row[:, None] * 2 + past_column[None, :] * 1


def attend(query, key, value, bias_table, map_to_token, token_to_window, window_size):
    """Attention within the windows of maps `(B, Hp, Wp, C)`."""
    heads = bias_table.shape[1]
    query, key, value = (
        rearrange(x, "b (y h) (x w) (n d) -> b y x n (h w) d", h=window_size, w=window_size, n=heads)
        for x in (query, key, value)
    )
    place = torch.arange(window_size, device=query.device)
    row, column = place.repeat_interleave(window_size), place.repeat(window_size)
    entry = (row[:, None] - row + window_size - 1) * (2 * window_size - 1) + column[:, None] - column + window_size - 1
    label = regions(map_to_token, token_to_window, window_size)
    label = rearrange(label, "(y h) (x w) -> y x 1 (h w)", h=window_size, w=window_size)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias_table[entry].permute(2, 0, 1)
    scores = scores + MASK_VALUE * (label[..., :, None] != label[..., None, :]).to(scores.dtype)
    return rearrange(
        scores.softmax(-1) @ value, "b y x n (h w) d -> b (y h) (x w) (n d)", h=window_size, w=window_size
    )


def local_window_attention(
    query, key, value, norm_q, norm_k, bias_table, rotary_cos, rotary_sin, map_to_token, token_to_window,
    window_size, eps, output_scale, with_maps,
):  # fmt: skip
    """See `ops.local_window_attention`."""
    heads = bias_table.shape[1]
    query = rotate(normalize(query.unflatten(-1, (heads, -1)), norm_q, eps), rotary_cos, rotary_sin).flatten(2)
    key = rotate(normalize(key.unflatten(-1, (heads, -1)), norm_k, eps), rotary_cos, rotary_sin).flatten(2)
    query, key, value = (to_map(x, map_to_token) for x in (query, key, value))
    output = output_scale * attend(query, key, value, bias_table, map_to_token, token_to_window, window_size)
    output = to_tokens(output, map_to_token, token_to_window.shape[0])
    return output, *((query, key) if with_maps else (query.new_empty(0), query.new_empty(0)))


def context_window_attention(
    query_map, key_map, value_map, bias_table, residual, map_to_token, token_to_window, window_size, output_scale
):
    """See `ops.context_window_attention`."""
    output = attend(query_map, key_map, value_map, bias_table, map_to_token, token_to_window, window_size)
    return residual + output_scale * to_tokens(output, map_to_token, token_to_window.shape[0])


def depthwise_gelu(token_map, weight):
    """See `ops.depthwise_gelu`."""
    features = F.conv2d(token_map.permute(0, 3, 1, 2), weight, padding=1, groups=weight.shape[0])
    features = F.gelu(features).permute(0, 2, 3, 1)
    return features, features.mean(dim=(1, 2))


def query_stage(token_map, depthwise, squeeze, excite, pointwise):
    """See `ops.query_stage_`; returns the map."""
    features, mean = depthwise_gelu(token_map, depthwise)
    gate = torch.sigmoid(F.linear(F.gelu(F.linear(mean, squeeze)), excite))
    return token_map + F.linear(features * gate[:, None, None], pointwise)
