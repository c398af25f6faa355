# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
A Triton kernel that adds up what the programs of another kernel left. PyTorch's sum, made for more numbers than these,
takes longer.
"""

import torch
import triton
import triton.language as tl

MOST_PARTS = 1024  # at a time
NUMBERS = 16  # of a part, for a program


@triton.jit
def _sum_parts(
    parts_ptr,  # (groups, parts, numbers)
    output_ptr,  # (groups, numbers)
    parts, numbers, PARTS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    number = (tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS))[None, :]
    group = tl.program_id(1)
    total = tl.zeros((PARTS, NUMBERS), tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        at = parts_ptr + ((group * parts + part) * numbers + number)
        total += tl.load(at, mask=(part < parts) & (number < numbers), other=0.0)
    sums = tl.sum(total, axis=0)[None, :].to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + (group * numbers + number), sums, mask=number < numbers)


def sum_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sums `(groups, numbers)` of `(groups, parts, numbers)` in float32, in a fixed order."""
    groups, count, numbers = parts.shape
    output = torch.empty((groups, numbers), dtype=dtype, device=parts.device)
    at_a_time = min(MOST_PARTS, triton.next_power_of_2(count))
    with torch.cuda.device_of(parts):
        _sum_parts[triton.cdiv(numbers, NUMBERS), groups](
            parts, output, count, numbers, at_a_time, NUMBERS, num_warps=8 if at_a_time > 128 else 4
        )
    return output
