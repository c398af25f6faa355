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
    is_function_mode_on,
    is_untouched,
    saves_passes,
)
from . import cpu
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
        if serves(attn, hidden_states) and self._attention_backend is None:
            return super().__call__(attn, hidden_states, geometry)
        plain = LocalDiTWindowAttnProcessor()
        plain._attention_backend, plain._parallel_config = self._attention_backend, self._parallel_config
        return plain(attn, hidden_states, geometry)

    def _attend_locally(self, attn, query, key, value, geometry: WindowGeometry):
        query, key, value = (x.contiguous() for x in (query, key, value))
        query_map = cpu.local_window_attention_(
            query,
            key,
            value,
            attn.norm_q.weight,
            attn.norm_k.weight,
            attn.rel_pos_bias,
            geometry,
            attn.norm_q.eps,
            share_of_branch(attn),
            with_maps=attn.global_context is not None,
        )
        return query_map, key, value

    def _query_context(self, context: LocalDiTGlobalContext, query_maps: list[torch.Tensor]):
        places = sum(part.shape[1] * part.shape[2] for part in query_maps)
        for stage in context.query_stages:
            weight, parts = stage.depthwise.weight, range(len(query_maps))
            features, sums = map(list, zip(*(cpu.depthwise_gelu(query_maps, i, weight) for i in parts)))
            mean = (sum(sums) / places).to(query_maps[0].dtype)  # (B, C)
            query_maps = stage.joined(features, mean, query_maps)
        return query_maps, context.rel_pos_bias

    def _join_context(self, attn, output, query_map, key, value, bias_table, geometry: WindowGeometry) -> torch.Tensor:
        query_map, key, value = (x.contiguous() for x in (query_map, key, value))
        cpu.add_context_window_attention_(output, query_map, key, value, bias_table, geometry, share_of_branch(attn))
        return output


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
