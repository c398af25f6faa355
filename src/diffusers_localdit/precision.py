"""
What numbers to compute in: the dtype that a device is good at, and 8-bit integers for CPUs.

In int8 each row of a weight and each token has a scale of its own. A weight is rounded once, to -64 ... 64, tokens in
each call, to -127 ... 127 (kept as 1 ... 255): where a processor has nothing better than AVX2, oneDNN adds up pairs of
products in 16 bits and cuts off what does not fit, which with such weights always does. So all processors get the
same sums.
"""

import platform
from collections.abc import Callable

import torch
from torch import nn

from .packed_linear import FrozenLinear, PackedLinear, replace_linears
from .transformer_localdit import LocalDiTTransformer2DModel

WEIGHT_LIMIT = 64  # a power of two: weights that were rounded are rounded to themselves again
TOKEN_LIMIT = 127
# What stands for 0 in tokens. oneDNN packs weights for tokens that have one; with others it falls back, on processors
# with VNNI, to a loop that is thousands of times slower.
ZERO_POINT = 128
TINY = torch.finfo(torch.float32).tiny


def fast_dtype(device: torch.device) -> torch.dtype:
    """
    The dtype that a device computes fast in.

    Args:
        device (`torch.device`): Where to compute.

    Returns:
        `torch.dtype`: bfloat16 on CUDA devices and on CPUs that multiply it (AMX, AVX512-BF16), else float32. Other
        CPUs emulate bfloat16, several times slower than float32.
    """
    capabilities = torch.cpu.get_capabilities()
    if device.type == "cuda" or (
        device.type == "cpu" and (capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    ):
        return torch.bfloat16
    return torch.float32


def why_not_int8(device: torch.device) -> str | None:
    """
    Why int8 cannot serve.

    Args:
        device (`torch.device`): Where to compute.

    Returns:
        `str`, *optional*: The reason, or `None` where it can.
    """
    if device.type != "cpu":
        return f"int8 is for CPUs, but the device is {device}; there, quantize with diffusers' TorchAoConfig"
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return "int8 needs an x86-64 processor and a PyTorch with oneDNN"
    return None


def quantize_int8(transformer: LocalDiTTransformer2DModel) -> LocalDiTTransformer2DModel:
    r"""
    Makes the linear layers in the blocks compute in int8, in place and for inference only. Activations keep their
    dtype.

    The state dict stays one in floating point, of the rounded weights. So a saved model loads anywhere, and quantized
    again it computes the very same.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]): A model on the CPU. LoRA layers have to be fused into it before.

    Returns:
        [`LocalDiTTransformer2DModel`]: The same model.

    Raises:
        `ValueError`: If int8 cannot serve where the model is, or it has LoRA layers or hooks on linears.
    """
    if reason := why_not_int8(transformer.device):
        raise ValueError(reason)
    replace_linears(transformer, [nn.Linear, PackedLinear], Int8Linear)
    return transformer


class Int8Linear(FrozenLinear):
    r"""A linear layer in int8."""

    packed = ("packed_weight", "weight_scale", "weight_zero_point")

    def pack(self, weight: torch.Tensor) -> None:
        weight = weight.float()  # (out, in)
        scale = (weight.abs().amax(dim=1, keepdim=True) / WEIGHT_LIMIT).clamp_min_(TINY)
        rounded = (weight / scale).round_().to(torch.int8)
        self.packed_weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.weight_scale = scale.flatten()
        self.weight_zero_point = torch.zeros(self.out_features, dtype=torch.long)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # `to(dtype)` concerns the weight in the state dict as it does the bias.
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return super()._apply(fn, recurse)

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight in floating point, `(out, in)`."""
        weight = self.packed_weight.to_dense().T * self.weight_scale[:, None]
        return weight.to(self.weight_dtype).contiguous()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.check(hidden_states)
        tokens = hidden_states.reshape(-1, self.in_features).float()
        scale = (tokens.abs().amax(dim=1, keepdim=True) / TOKEN_LIMIT).clamp_min_(TINY)  # (tokens, 1)
        product = torch.ops.onednn.qlinear_pointwise(
            qx=(tokens / scale).round_().add_(ZERO_POINT).to(torch.uint8),
            x_scale=1.0,
            x_zero_point=ZERO_POINT,
            qw=self.packed_weight,
            w_scale=self.weight_scale,
            w_zero_point=self.weight_zero_point,
            bias=None,
            output_scale=1.0,
            output_zero_point=0,
            output_dtype=torch.float32,
            post_op_name="none",
            post_op_args=[],
            post_op_algorithm="",
        )
        output = product * scale if self.bias is None else torch.addcmul(self.bias.float(), product, scale)
        return output.to(hidden_states.dtype).view(*hidden_states.shape[:-1], self.out_features)
