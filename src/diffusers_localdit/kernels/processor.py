# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""Self-attention of LocalDiT through the Triton kernels, and how it is put into a transformer and taken out again."""

import importlib.util

import torch
from torch.autograd import forward_ad

from ..transformer_localdit import (
    GlobalContextQueryStage,
    LocalDiTTransformer2DModel,
    LocalDiTWindowAttention,
    LocalDiTWindowAttnProcessor,
    WindowGeometry,
    is_plain,
    is_untouched,
    keeps_nothing,
)

WINDOW_SIZES = range(2, 17)
HEAD_DIMS = range(8, 129, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not_triton(transformer: LocalDiTTransformer2DModel, device: torch.device | None = None) -> str | None:
    r"""
    Says why the Triton kernels cannot serve a transformer as it is now.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]): The transformer, in the dtype it will run in.
        device (`torch.device`, *optional*): Where it will run; where it is if not given.

    Returns:
        `str` or `None`: The reason in a sentence, or `None` if the kernels can serve.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install 'diffusers-localdit[triton]'` (Linux)."
    if (reason := why_not_model(transformer)) is not None:
        return reason
    weight = next(transformer.transformer_blocks.parameters())
    return why_not_there(device or weight.device, weight.dtype)


def why_not_model(transformer: LocalDiTTransformer2DModel) -> str | None:
    """Why no kernels can serve a transformer of these sizes and with these processors, if they cannot."""
    config = transformer.config
    if config.window_size not in WINDOW_SIZES:
        return f"The kernels take windows of 2 to 16 tokens a side, not {config.window_size}."
    if config.attention_head_dim not in HEAD_DIMS:
        return f"The kernels take heads of 8 to 128 channels, not {config.attention_head_dim}."
    for processor in transformer.attn_processors.values():
        if getattr(processor, "_parallel_config", None) is not None:
            return "The kernels cannot share a sequence between devices: context parallelism is on."
        if isinstance(processor, LocalDiTWindowAttnProcessor) and processor._attention_backend is not None:
            return (
                f"The attention backend {str(processor._attention_backend.value)!r} was asked for; call "
                "`transformer.reset_attention_backend()` to let the kernels take its place."
            )
    return None


def why_not_there(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on a device and in a dtype, if they cannot."""
    if dtype not in DTYPES:
        return f"The kernels compute in float32, float16 and bfloat16, not in {dtype}."
    if device.type == "cuda":
        if torch.version.cuda is not None and torch.cuda.get_device_capability(device) < (8, 0):
            return "The kernels need a GPU of compute capability 8.0 (Ampere) or later."
    elif device.type != "cpu" or not interpreted():
        return f"The kernels run on CUDA devices, not on {device.type!r} (a CPU serves under TRITON_INTERPRET=1)."
    return None


def why_not_call(attn: LocalDiTWindowAttention, tokens: torch.Tensor) -> str | None:
    """Why the kernels cannot serve an attention module for these tokens, if they cannot."""
    if attn.norm_q.weight.device != tokens.device:
        return (
            f"The kernels read weights without calling the modules that hold them, but some are on"
            f" {attn.norm_q.weight.device.type!r}: offload whole models or blocks, not single layers."
        )
    if forward_ad.unpack_dual(tokens).tangent is not None:  # which the operators would drop without a word
        return "The kernels have no derivative in forward mode."
    return why_not_there(tokens.device, tokens.dtype)


def share_of_branch(attn: LocalDiTWindowAttention) -> float:
    """Factor of the local branch's output, and of the context branch's where there is one."""
    return 1.0 if attn.global_context is None else 0.5


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    import triton

    return triton.knobs.runtime.interpret


class LocalDiTTritonAttnProcessor:
    r"""
    Shifted-window attention with an optional global-context branch, each branch in one kernel that reads queries, keys
    and values once and writes the output once; trainable. Computes what [`LocalDiTWindowAttnProcessor`] computes.

    The kernels read the weights of the norms of query and key: hooks on these two are not called.

    Install it with [`install_triton_kernels`].
    """

    _parallel_config = None

    def __init__(self):
        from . import ops  # needs Triton

        self.ops = ops

    def __reduce__(self):  # for copies and pickles: the module of operators can be neither
        return type(self), ()

    def __call__(
        self, attn: LocalDiTWindowAttention, hidden_states: torch.Tensor, geometry: WindowGeometry
    ) -> torch.Tensor:
        context = attn.global_context
        # Nothing is named that the next step does not need: at large sizes a tensor of all tokens is much memory.
        output, query_map, key_map = self._attend_locally(attn, attn.project(hidden_states), geometry)
        if context is not None:
            if is_untouched(context):
                for stage in context.query_stages:
                    query_map = self._query_stage(stage, query_map)
            else:
                [query_map], _ = context([query_map])
            key, value = context.to_k(key_map), context.to_v(key_map)  # both are read from the rotated keys
            del key_map
            output = self.ops.context_window_attention(
                query_map,
                key,
                value,
                context.rel_pos_bias,
                output,
                geometry.map_to_token,
                geometry.token_to_window,
                attn.window_size,
                share_of_branch(attn),
            )  # (B, L, C)
        return attn.to_out[0](output)

    def _attend_locally(
        self,
        attn: LocalDiTWindowAttention,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        geometry: WindowGeometry,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output `(B, L, C)` of the local branch, and for the context queries and keys on the map `(B, Hp, Wp, C)`."""
        query = projected[0]
        if not torch.compiler.is_compiling() and (reason := why_not_call(attn, query)) is not None:
            raise RuntimeError(f"{reason} `uninstall_kernels` restores PyTorch's attention.")
        arguments = (
            *projected,
            attn.norm_q.weight,
            attn.norm_k.weight,
            attn.rel_pos_bias,
            geometry.rotary_cos,
            geometry.rotary_sin,
            geometry.map_to_token,
            geometry.token_to_window,
            attn.window_size,
            attn.norm_q.eps,
            share_of_branch(attn),
            attn.global_context is not None,
        )
        if keeps_nothing() and query.is_contiguous():
            return query, *self.ops.local_window_attention_(*arguments)
        return self.ops.local_window_attention(*arguments)

    def _query_stage(self, stage: GlobalContextQueryStage, query_map: torch.Tensor) -> torch.Tensor:
        depthwise = stage.depthwise
        if type(depthwise) is not torch.nn.Conv2d or not (is_untouched(stage) and is_untouched(depthwise)):
            return stage([query_map])[0]
        depthwise = depthwise.weight.to(query_map.dtype)
        linears = (stage.squeeze, stage.excite, stage.pointwise)
        if not torch.is_grad_enabled() and all(is_plain(linear, query_map) for linear in linears):
            self.ops.query_stage_(query_map, depthwise, *(linear.weight for linear in linears))
            return query_map
        features, mean = self.ops.depthwise_gelu(query_map, depthwise)
        gate = stage.gate(mean)  # (B, C)
        if not is_plain(stage.pointwise, features):
            return query_map + stage.pointwise(features * gate[:, None, None])
        # query_map + W (gate * features), with the gate in W instead, which is smaller where maps are large.
        weight = stage.pointwise.weight * gate[:, None]  # (B, C, C)
        rows = (x.flatten(1, 2) for x in (query_map, features))  # (B, Hp*Wp, C)
        return torch.baddbmm(*rows, weight.transpose(1, 2)).view_as(query_map)


def install_triton_kernels(transformer: LocalDiTTransformer2DModel) -> None:
    r"""
    Computes the self-attention of a transformer with the Triton kernels from now on.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]): The transformer, on the device and in the dtype it will run in.

    Raises:
        `RuntimeError`: If the kernels cannot serve it, with the reason that [`why_not_triton`] gives.
    """
    if (reason := why_not_triton(transformer)) is not None:
        raise RuntimeError(f"The Triton kernels cannot serve this transformer. {reason}")
    transformer.set_attn_processor(LocalDiTTritonAttnProcessor())


def uninstall_kernels(transformer: LocalDiTTransformer2DModel) -> None:
    r"""
    Computes the self-attention of a transformer with PyTorch again.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]): The transformer.
    """
    transformer.set_attn_processor(LocalDiTWindowAttnProcessor())
