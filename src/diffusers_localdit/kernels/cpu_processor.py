# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""Self-attention of LocalDiT through the CPU kernels, and how it is put into a transformer and taken out again."""

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from torch.autograd import forward_ad

from ..transformer_localdit import (
    GlobalContextQueryStage,
    LocalDiTGlobalContext,
    LocalDiTRMSNorm,
    LocalDiTTransformer2DModel,
    LocalDiTWindowAttention,
    LocalDiTWindowAttnProcessor,
    WindowGeometry,
    add_product,
    is_function_mode_on,
    is_untouched,
    saves_passes,
    slab_size,
)
from . import cpu
from .bands import split_into_bands
from .processor import share_of_branch, why_not_model

# Of modules that the kernels compute without calling them. Adapters put others in their places.
KINDS = (LocalDiTRMSNorm, LocalDiTGlobalContext, GlobalContextQueryStage, torch.nn.Conv2d)


def why_not_cpu_kernels(transformer: LocalDiTTransformer2DModel) -> str | None:
    r"""
    Says why the CPU kernels cannot serve a transformer as it is now. They are compiled for that, unless they have been
    on this machine before: a few seconds.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]): The transformer, in the dtype it will run in.

    Returns:
        `str` or `None`: The reason in a sentence, or `None` if the kernels can serve.
    """
    if (reason := why_not_model(transformer)) is not None:
        return reason
    return why_not_cpu(next(transformer.transformer_blocks.parameters()).device, transformer.dtype)


def why_not_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on a device of this machine and in a dtype, if they cannot."""
    if device.type != "cpu":
        return f"The kernels run on the CPU, not on {device.type!r}."
    if dtype not in cpu.DTYPES:
        return f"The kernels compute in float32 and bfloat16, not in {dtype}."
    try:
        cpu.load_library()
    except OSError as error:
        return f"The kernels are not to be had: {error}."
    return None


class LocalDiTCPUAttnProcessor(LocalDiTWindowAttnProcessor):
    r"""
    Shifted-window attention with an optional global-context branch on a CPU, each branch in one kernel, and so are the
    convolutions of the context's queries. Computes what [`LocalDiTWindowAttnProcessor`] computes, and leaves to it
    what they are not made for: gradients, compilation, autocast, other dtypes, another attention backend, and modules
    with hooks or adapters that the kernels would not call.

    Install it with [`install_cpu_kernels`].
    """

    def __call__(
        self, attn: LocalDiTWindowAttention, hidden_states: torch.Tensor, geometry: WindowGeometry
    ) -> torch.Tensor:
        if not serves(attn, hidden_states) or self._attention_backend is not None:
            return super().__call__(attn, hidden_states, geometry)
        bands = split_into_bands(geometry, slab_size(hidden_states))  # of l tokens
        context, share = attn.global_context, share_of_branch(attn)
        query_maps, keys, outputs = [], [], []
        if context is None:
            result = torch.empty_like(hidden_states)
        for band in bands:
            query, key, value = map(cpu.evenly_spaced, attn.project(band.take(hidden_states)))  # (B, l, C)
            output = value if value.is_contiguous() else torch.empty_like(value, memory_format=torch.contiguous_format)
            query_map = cpu.local_window_attention(
                query,
                key,
                value,
                attn.norm_q.weight,
                attn.norm_k.weight,
                attn.rel_pos_bias,
                band,
                attn.norm_q.eps,
                share,
                output,
                with_maps=context is not None,
            )
            if context is None:
                band.put(attn.to_out[0](output), result)
                continue
            query_maps.append(query_map)
            keys.append(key)
            outputs.append(output)
        if context is None:
            return result

        query_maps = query_context(context, query_maps)
        result = torch.empty_like(hidden_states)  # not before: the stages are where most memory is taken
        padding = keys_and_values_of_padding(context, hidden_states, geometry)
        for band, query_map, key, output in zip(bands, query_maps, keys, outputs):
            key, value = cpu.evenly_spaced(context.to_k(key)), cpu.evenly_spaced(context.to_v(key))
            cpu.add_context_window_attention_(
                output, query_map, key, value, *padding, context.rel_pos_bias, band, share
            )
            band.put(attn.to_out[0](output), result)
        return result


def query_context(context: LocalDiTGlobalContext, query_maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """The map of queries `(B, rows, Wp, C)` after the stages, in contiguous parts as before."""
    places = sum(part.shape[1] * part.shape[2] for part in query_maps)
    for stage in context.query_stages:
        weight, parts = stage.depthwise.weight, range(len(query_maps))
        features, sums = map(list, zip(*(cpu.depthwise_gelu(query_maps, i, weight) for i in parts)))
        mean = (sum(sums) / places).to(query_maps[0].dtype)  # (B, C)
        gate = stage.gate(mean)
        for i, query_map in enumerate(query_maps):
            features[i] = add_product(stage.pointwise, cpu.excite_(features[i], gate), query_map).contiguous()
        query_maps = features
    return query_maps


def keys_and_values_of_padding(
    context: LocalDiTGlobalContext, hidden_states: torch.Tensor, geometry: WindowGeometry
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the context branch reads from zeros, `(C,)` each, if the map is padded."""
    if geometry.map_to_token.numel() == geometry.token_to_window.numel():
        return None, None
    zeros = hidden_states.new_zeros(1, 1, hidden_states.shape[2])
    return context.to_k(zeros).flatten(), context.to_v(zeros).flatten()


# diffusers' skipping of layers looks processors up here.
AttentionProcessorRegistry._registry[LocalDiTCPUAttnProcessor] = AttentionProcessorRegistry._registry[
    LocalDiTWindowAttnProcessor
]


def serves(attn: LocalDiTWindowAttention, tokens: torch.Tensor) -> bool:
    """Whether the kernels may compute an attention module for these tokens, and take the memory of what they read."""
    if not saves_passes(tokens) or type(tokens) is not torch.Tensor or tokens.dtype not in cpu.DTYPES:
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(tokens).tangent is not None
    if transformed or torch.is_autocast_enabled("cpu") or is_function_mode_on():
        return False
    context = attn.global_context
    read = [attn.norm_q, attn.norm_k]
    if context is not None:
        read += [context, *context.query_stages, *(stage.depthwise for stage in context.query_stages)]
    there = attn.norm_q.weight.device == tokens.device
    return there and all(type(module) in KINDS and is_untouched(module) for module in read)


def install_cpu_kernels(transformer: LocalDiTTransformer2DModel) -> None:
    r"""
    Computes the self-attention of a transformer with the CPU kernels from now on, where no gradients are wanted.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]): The transformer, on the CPU and in the dtype it will run in.

    Raises:
        `RuntimeError`: If the kernels cannot serve it, with the reason that [`why_not_cpu_kernels`] gives.
    """
    if (reason := why_not_cpu_kernels(transformer)) is not None:
        raise RuntimeError(f"The CPU kernels cannot serve this transformer. {reason}")
    transformer.set_attn_processor(LocalDiTCPUAttnProcessor())
