# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
The kernels as PyTorch operators `torch.ops.diffusers_localdit.*`, with shapes for tracing and gradients. Importing
this needs Triton.

Shape legend: B batch, L tokens of the image, Hp x Wp its map, padded and rolled, w window size, C = heads * head_dim.
"""

import torch
from torch import Tensor

from . import query_gate, query_stage, window_attention
from .window_attention import Preparation


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("diffusers_localdit::local_window_attention", mutates_args=())
def local_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    bias_table: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    map_to_token: Tensor,
    token_to_window: Tensor,
    window_size: int,
    eps: float,
    output_scale: float,
    with_maps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Local branch of LocalDiT's self-attention: RMS norm of queries and keys, rotary embedding, shifted windows,
    position bias, region mask, attention, and back to image order.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, L, C)`): Projected tokens; may be parts of one packed tensor.
        norm_q, norm_k (`torch.Tensor` of shape `(head_dim,)`): Weights of the norms.
        bias_table (`torch.Tensor` of shape `((2w-1)^2, heads)`): Relative position bias.
        rotary_cos, rotary_sin (`torch.Tensor` of shape `(L, 1, head_dim // 2)`, *optional*): Rotary table.
        map_to_token (`torch.Tensor` of shape `(Hp, Wp)`): The token at each place of the map; `L` is padding.
        token_to_window (`torch.Tensor` of shape `(L,)`): Place of each token in the flattened windows.
        window_size (`int`): w, 2 to 16.
        eps (`float`): Of the norms.
        output_scale (`float`): Factor of the output.
        with_maps (`bool`): Whether to return the prepared queries and keys on the map, for the context branch.

    Returns:
        `(B, L, C)`, and two `(B, Hp, Wp, C)` or two empty tensors.
    """
    preparation = Preparation(norm_q, norm_k, rotary_cos, rotary_sin, eps)
    return window_attention.forward(
        query, key, value, preparation, bias_table, map_to_token, token_to_window, window_size, output_scale,
        with_maps=with_maps,
    )  # fmt: skip


@local_window_attention.register_fake
def _(
    query, key, value, norm_q, norm_k, bias_table, rotary_cos, rotary_sin, map_to_token, token_to_window,
    window_size, eps, output_scale, with_maps,
):  # fmt: skip
    map_shape = (query.shape[0], *map_to_token.shape, query.shape[2]) if with_maps else (0,)
    return _empty_like(query), query.new_empty(map_shape), query.new_empty(map_shape)


@torch.library.custom_op(
    "diffusers_localdit::local_window_attention_",
    mutates_args=("query",),
    schema="(Tensor(a!) query, Tensor key, Tensor value, Tensor norm_q, Tensor norm_k, Tensor bias_table,"
    " Tensor? rotary_cos, Tensor? rotary_sin, Tensor map_to_token, Tensor token_to_window, int window_size, float eps,"
    " float output_scale, bool with_maps) -> (Tensor, Tensor)",
)
def local_window_attention_(query, key, value, norm_q, norm_k, bias_table, cos, sin, *arguments):
    """`local_window_attention` that writes its output over `query`, contiguous, and returns the maps. No gradients."""
    *indices, window_size, eps, output_scale, with_maps = arguments
    preparation = Preparation(norm_q, norm_k, cos, sin, eps)
    return window_attention.forward(
        query, key, value, preparation, bias_table, *indices, window_size, output_scale,
        with_maps=with_maps, overwrite=True,
    )[1:]  # fmt: skip


@local_window_attention_.register_fake
def _(query, key, value, norm_q, norm_k, bias_table, rotary_cos, rotary_sin, map_to_token, *settings):
    map_shape = (query.shape[0], *map_to_token.shape, query.shape[2]) if settings[-1] else (0,)
    return query.new_empty(map_shape), query.new_empty(map_shape)


@torch.library.custom_op("diffusers_localdit::local_window_attention_backward", mutates_args=())
def local_window_attention_backward(
    grad_output: Tensor,
    grad_query_map: Tensor,
    grad_key_map: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    bias_table: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    map_to_token: Tensor,
    token_to_window: Tensor,
    window_size: int,
    eps: float,
    output_scale: float,
    with_maps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, the norms' weights `(2, head_dim)` and the bias table."""
    preparation = Preparation(norm_q, norm_k, rotary_cos, rotary_sin, eps)
    return window_attention.backward(
        grad_output, grad_query_map if with_maps else None, grad_key_map if with_maps else None, query, key, value,
        preparation, bias_table, map_to_token, token_to_window, window_size, output_scale,
    )  # fmt: skip


@local_window_attention_backward.register_fake
def _(
    grad_output, grad_query_map, grad_key_map, query, key, value, norm_q, norm_k, bias_table, rotary_cos, rotary_sin,
    map_to_token, token_to_window, window_size, eps, output_scale, with_maps,
):  # fmt: skip
    grad_norm = norm_q.new_empty((2, norm_q.shape[0]), dtype=torch.float32)
    return _empty_like(query), _empty_like(key), _empty_like(value), grad_norm, _empty_like(bias_table)


def _save_local(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[10:]


def _local_backward(ctx, grad_output, grad_query_map, grad_key_map):
    saved = ctx.saved_tensors  # once: gradient checkpointing lets nobody ask twice
    norm_q, norm_k = saved[3:5]
    grad_query, grad_key, grad_value, grad_norm, grad_table = local_window_attention_backward(
        grad_output, grad_query_map, grad_key_map, *saved, *ctx.settings
    )
    grad_norm_q, grad_norm_k = grad_norm[0].to(norm_q.dtype), grad_norm[1].to(norm_k.dtype)
    return grad_query, grad_key, grad_value, grad_norm_q, grad_norm_k, grad_table, *[None] * 8


local_window_attention.register_autograd(_local_backward, setup_context=_save_local)


@torch.library.custom_op("diffusers_localdit::context_window_attention", mutates_args=())
def context_window_attention(
    query_map: Tensor,
    key_map: Tensor,
    value_map: Tensor,
    bias_table: Tensor,
    residual: Tensor,
    map_to_token: Tensor,
    token_to_window: Tensor,
    window_size: int,
    output_scale: float,
) -> Tensor:
    r"""
    Attention within the windows of maps `(B, Hp, Wp, C)`, times `output_scale`, in image order and added to `residual`
    `(B, L, C)`. Other arguments as in `local_window_attention`.
    """
    return window_attention.forward(
        query_map.flatten(1, 2), key_map.flatten(1, 2), value_map.flatten(1, 2), None, bias_table, map_to_token,
        token_to_window, window_size, output_scale, residual=residual,
    )[0]  # fmt: skip


@context_window_attention.register_fake
def _(query_map, key_map, value_map, bias_table, residual, map_to_token, token_to_window, window_size, output_scale):
    return _empty_like(residual)


@torch.library.custom_op("diffusers_localdit::context_window_attention_backward", mutates_args=())
def context_window_attention_backward(
    grad_output: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    value_map: Tensor,
    bias_table: Tensor,
    map_to_token: Tensor,
    token_to_window: Tensor,
    window_size: int,
    output_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three maps and of the bias table."""
    *grads, _, grad_table = window_attention.backward(
        grad_output, None, None, query_map.flatten(1, 2), key_map.flatten(1, 2), value_map.flatten(1, 2), None,
        bias_table, map_to_token, token_to_window, window_size, output_scale,
    )  # fmt: skip
    grad_query, grad_key, grad_value = (grad.view(query_map.shape) for grad in grads)
    return grad_query, grad_key, grad_value, grad_table


@context_window_attention_backward.register_fake
def _(
    grad_output, query_map, key_map, value_map, bias_table, map_to_token, token_to_window, window_size, output_scale
):
    return _empty_like(query_map), _empty_like(key_map), _empty_like(value_map), _empty_like(bias_table)


def _save_context(ctx, inputs, output):
    query_map, key_map, value_map, bias_table, _, map_to_token, token_to_window, *ctx.settings = inputs
    ctx.save_for_backward(query_map, key_map, value_map, bias_table, map_to_token, token_to_window)


def _context_backward(ctx, grad_output):
    *grads, grad_table = context_window_attention_backward(grad_output, *ctx.saved_tensors, *ctx.settings)
    return *grads, grad_table, grad_output, None, None, None, None


context_window_attention.register_autograd(_context_backward, setup_context=_save_context)


@torch.library.custom_op("diffusers_localdit::depthwise_gelu", mutates_args=())
def depthwise_gelu(token_map: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    The start of a query stage of the context branch: depthwise 3x3 convolution of the map (zeros around it), exact
    GELU, and the mean over the map.

    Args:
        token_map (`torch.Tensor` of shape `(B, Hp, Wp, C)`): Rolled, padded map.
        weight (`torch.Tensor` of shape `(C, 1, 3, 3)`): Of the convolution.

    Returns:
        Features `(B, Hp, Wp, C)` and their mean `(B, C)`.
    """
    return query_stage.forward(token_map, weight)


@depthwise_gelu.register_fake
def _(token_map, weight):
    return _empty_like(token_map), token_map.new_empty((token_map.shape[0], token_map.shape[3]))


@torch.library.custom_op("diffusers_localdit::depthwise_gelu_backward", mutates_args=())
def depthwise_gelu_backward(
    grad_features: Tensor, grad_mean: Tensor, token_map: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the map and of the weight."""
    return query_stage.backward(grad_features, grad_mean, token_map, weight)


@depthwise_gelu_backward.register_fake
def _(grad_features, grad_mean, token_map, weight):
    return _empty_like(token_map), _empty_like(weight)


def _save_stage(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _stage_backward(ctx, grad_features, grad_mean):
    return depthwise_gelu_backward(grad_features, grad_mean, *ctx.saved_tensors)


depthwise_gelu.register_autograd(_stage_backward, setup_context=_save_stage)


@torch.library.custom_op("diffusers_localdit::query_stage_", mutates_args=("token_map",))
def query_stage_(token_map: Tensor, depthwise: Tensor, squeeze: Tensor, excite: Tensor, pointwise: Tensor) -> None:
    r"""
    A whole query stage of the context branch, written over its map. Gradients do not pass through it.

    Args:
        token_map (`torch.Tensor` of shape `(B, Hp, Wp, C)`): Rolled, padded map, whose places follow each other.
        depthwise, squeeze, excite, pointwise (`torch.Tensor`):
            Weights of shapes `(C, 1, 3, 3)`, `(hidden, C)`, `(C, hidden)` and `(C, C)`.
    """
    features, means = query_stage.features(token_map, depthwise)
    # map + W (gate * features), with the gate in W, which is smaller where maps are large.
    weight = query_gate.gated_weight(means, squeeze, excite, pointwise, token_map.dtype)  # (B, C, C)
    rows = token_map.view(token_map.shape[0], -1, token_map.shape[3])  # no copy, or nobody would see the result
    rows.baddbmm_(features.flatten(1, 2), weight.transpose(1, 2))
