"""
The computation of the released LocalDiT step by step, on the weights of a `LocalDiTTransformer2DModel`: pad, roll, cut
into windows, attend, undo. What `transformer.py` checks the model against and measures it by.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

from diffusers_localdit.transformer_localdit import (
    MASK_VALUE,
    LocalDiTTransformer2DModel,
    LocalDiTTransformerBlock,
    relative_position_index,
    rotary_table,
    sincos_pos_embed,
)


def rms_norm(hidden_states, norm):
    variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
    return (hidden_states * torch.rsqrt(variance + norm.eps)).to(hidden_states.dtype) * norm.weight


def rotate(hidden_states, cos, sin):
    """`(B, L, heads, d)`, interleaved pairs."""
    a, b = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(hidden_states.dtype)


def region_mask(height: int, width: int, w: int, shift: int, device) -> torch.Tensor:
    """-10000 between the nine regions of a rolled map, `(n, 1, w*w, w*w)`."""
    regions = torch.zeros(height, width, device=device)
    if shift > 0:
        cuts = (slice(0, -w), slice(-w, -shift), slice(-shift, None))
        for i, rows in enumerate(cuts):
            for j, columns in enumerate(cuts):
                regions[rows, columns] = 3 * i + j
    regions = rearrange(regions, "(r h) (c w) -> (r c) (h w)", h=w, w=w)
    return (regions[:, None, :, None] != regions[:, None, None, :]) * MASK_VALUE


def window_attention(query, key, value, table, w: int, shift: int, heads: int) -> torch.Tensor:
    """Maps `(B, Hp, Wp, C)`, already rolled, to one such map."""
    batch_size, height, width, _ = query.shape
    query, key, value = (
        rearrange(x, "b (r h) (c w) (m d) -> (b r c) m (h w) d", h=w, w=w, m=heads) for x in (query, key, value)
    )
    bias = table[relative_position_index(w, table.device)].permute(2, 0, 1)
    bias = bias + region_mask(height, width, w, shift, table.device).to(table.dtype)  # (n, heads, w*w, w*w)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.repeat(batch_size, 1, 1, 1))
    return rearrange(output, "(b r c) m (h w) d -> b (r h) (c w) (m d)", b=batch_size, r=height // w, h=w, w=w)


def query_stage(stage, query_map):
    """`(B, C, Hp, Wp)`."""
    features = F.gelu(stage.depthwise(query_map))
    gate = torch.sigmoid(stage.excite(F.gelu(stage.squeeze(features.mean(dim=(2, 3))))))
    return query_map + F.conv2d(features * gate[:, :, None, None], stage.pointwise.weight[:, :, None, None])


def self_attention(attn, hidden_states, height: int, width: int, w: int, shift: int, use_rope: bool) -> torch.Tensor:
    query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query = rms_norm(query.unflatten(-1, (attn.heads, -1)), attn.norm_q)
    key = rms_norm(key.unflatten(-1, (attn.heads, -1)), attn.norm_k)
    if use_rope:
        cos, sin = rotary_table(height, width, query.shape[-1], query.device)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)

    maps = [x.reshape(x.shape[0], height, width, -1) for x in (query, key, value)]
    maps = [F.pad(x, (0, 0, 0, -width % w, 0, -height % w)) for x in maps]
    query, key, value = (torch.roll(x, (-shift, -shift), dims=(1, 2)) for x in maps)
    output = window_attention(query, key, value, attn.rel_pos_bias, w, shift, attn.heads)
    if (context := attn.global_context) is not None:
        query = query.permute(0, 3, 1, 2).contiguous()
        for stage in context.query_stages:
            query = query_stage(stage, query)
        context_output = window_attention(
            query.permute(0, 2, 3, 1), context.to_k(key), context.to_v(key), context.rel_pos_bias, w, shift, attn.heads
        )
        output = (output + context_output) / 2
    output = torch.roll(output, (shift, shift), dims=(1, 2))[:, :height, :width].flatten(1, 2)
    return attn.to_out[0](output) + hidden_states


def cross_attention(attn, hidden_states, text, mask) -> torch.Tensor:
    query, key, value = (
        x.unflatten(-1, (attn.heads, -1)) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
    )
    query, key = rms_norm(query, attn.norm_q), rms_norm(key, attn.norm_k)
    output = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask)
    return attn.to_out[0](output.transpose(1, 2).flatten(2))


def block_forward(block: LocalDiTTransformerBlock, hidden_states, text, modulation, mask, *window) -> torch.Tensor:
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
        block.scale_shift_table[None] + modulation
    ).chunk(6, dim=1)
    normed = block.norm1(hidden_states) * (1 + scale_msa) + shift_msa
    hidden_states = hidden_states + gate_msa * self_attention(block.attn, normed, *window)
    hidden_states = hidden_states + cross_attention(block.cross_attn, hidden_states, text, mask)
    normed = block.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
    widened = F.gelu(block.ff.net[0].proj(normed), approximate="tanh")
    return hidden_states + gate_mlp * block.ff.net[2](widened)


def plain_forward(
    model: LocalDiTTransformer2DModel,
    hidden_states,
    encoder_hidden_states,
    timestep,
    added_cond_kwargs,
    encoder_attention_mask,
) -> torch.Tensor:
    """What `model(...).sample` is."""
    config, device = model.config, hidden_states.device
    height, width = (side // config.patch_size for side in hidden_states.shape[-2:])

    hidden_states = model.pos_embed.proj(hidden_states).flatten(2).transpose(1, 2)
    base_size = config.sample_size // config.patch_size
    position = sincos_pos_embed(height, width, hidden_states.shape[-1], base_size, model.interpolation_scale, device)
    hidden_states = (hidden_states + position).to(hidden_states.dtype)
    modulation, embedded_timestep = model.adaln_single(
        timestep, added_cond_kwargs, batch_size=len(timestep), hidden_dtype=hidden_states.dtype
    )
    text = model.caption_projection(encoder_hidden_states)
    mask = (1 - encoder_attention_mask.to(hidden_states.dtype))[:, None, None] * MASK_VALUE

    for i, block in enumerate(model.transformer_blocks):
        window = (height, width, config.window_size, i % config.window_size, config.use_rope)
        hidden_states = block_forward(block, hidden_states, text, modulation.unflatten(1, (6, -1)), mask, *window)

    shift, scale = (model.scale_shift_table[None] + embedded_timestep[:, None]).chunk(2, dim=1)
    hidden_states = model.proj_out(model.norm_out(hidden_states) * (1 + scale) + shift)
    sides = {"h": height, "p": config.patch_size, "q": config.patch_size}
    return rearrange(hidden_states, "b (h w) (p q c) -> b c (h p) (w q)", **sides)
