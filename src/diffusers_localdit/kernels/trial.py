# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""The kernels as a default: put in where they have just been seen to serve."""

import copy

import torch

from ..checkpoint_io import one_line
from ..transformer_localdit import (
    LocalDiTTransformer2DModel,
    LocalDiTWindowAttention,
    LocalDiTWindowAttnProcessor,
    rotary_table,
    window_geometry,
)
from .cpu_processor import LocalDiTCPUAttnProcessor, why_not_cpu_kernels
from .processor import LocalDiTTritonAttnProcessor, why_not_triton

# Several times what each makes of two ways to compute the same.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}


def try_triton_kernels(
    transformer: LocalDiTTransformer2DModel, device: torch.device, dtype: torch.dtype, training: bool = False
) -> str | None:
    r"""
    Computes the self-attention of a transformer with the Triton kernels from now on, if they compile on this machine
    and agree with PyTorch: with the weights of the first block, on a map that is padded and shifted. A transformer for
    which they do not stays as it was.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]): The transformer, wherever it is now.
        device (`torch.device`): Where it will run.
        dtype (`torch.dtype`): What it will compute in; autocast sees to that where its weights are in another one.
        training (`bool`, defaults to `False`): Whether it will also be trained.

    Returns:
        `str`, *optional*: Why PyTorch computes the self-attention as before, or `None` if the kernels do.
    """
    if (reason := why_not_triton(transformer, device)) is not None:
        return reason
    return try_kernels(transformer, LocalDiTTritonAttnProcessor, device, dtype, training)


def try_cpu_kernels(transformer: LocalDiTTransformer2DModel) -> str | None:
    r"""
    Computes the self-attention of a transformer with the CPU kernels from now on, if they compile on this machine and
    agree with PyTorch, as [`try_triton_kernels`] does.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]): The transformer, on the CPU and in the dtype it will run in.

    Returns:
        `str`, *optional*: Why PyTorch computes the self-attention as before, or `None` if the kernels do.
    """
    if (reason := why_not_cpu_kernels(transformer)) is not None:
        return reason
    return try_kernels(transformer, LocalDiTCPUAttnProcessor, transformer.device, transformer.dtype)


def try_kernels(
    transformer: LocalDiTTransformer2DModel,
    processor_class: type,
    device: torch.device,
    dtype: torch.dtype,
    training: bool = False,
) -> str | None:
    for block in transformer.transformer_blocks:
        if type(block.attn.processor) is not LocalDiTWindowAttnProcessor:
            return f"A {type(block.attn.processor).__name__} computes it, and is left in its place."
    attn = copy.deepcopy(transformer.transformer_blocks[0].attn).to(device)
    results = []
    try:
        for each in (LocalDiTWindowAttnProcessor, processor_class):
            attn.set_processor(each())
            results.append(attend(attn, transformer.config.use_rope, dtype, training))
    except Exception as error:  # whatever compilers, Triton and the driver raise
        return f"The kernels do not run here: {one_line(error)}"
    for expected, actual in zip(*results):
        if not (actual - expected).norm() <= TOLERANCE[dtype] * expected.norm():
            return "The kernels give other numbers than PyTorch here."
    transformer.set_attn_processor(processor_class())
    return None


def attend(attn: LocalDiTWindowAttention, use_rope: bool, dtype: torch.dtype, training: bool) -> list[torch.Tensor]:
    """What becomes of random tokens, without gradients and in training also with them, and the gradient of these."""
    weight, side = attn.norm_q.weight, attn.window_size + 1
    rotary = rotary_table(side, side, len(weight), weight.device) if use_rope else (None, None)
    geometry = window_geometry(side, side, attn.window_size, 1, rotary, weight.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, side * side, attn.heads * len(weight), generator=generator).to(weight)
    with torch.autocast(weight.device.type, dtype, enabled=weight.dtype != dtype):
        with torch.no_grad():
            results = [attn.processor(attn, tokens, geometry)]
        if training:
            output = attn.processor(attn, tokens.requires_grad_(), geometry)
            results += [output.detach(), *torch.autograd.grad(output.float().square().sum(), tokens)]
    return [x.float() for x in results]
