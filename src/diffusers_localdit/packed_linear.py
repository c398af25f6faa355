"""
Linear layers whose weights are laid out once as the processor wants them, for inference on a CPU.

PyTorch hands products of float32 to MKL and those of bfloat16 to oneDNN, and both get weights as a training step needs
them: what is a good order for a product is found and made in each call. Here oneDNN computes both, with weights that
lie in that order.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.activations import GELU
from torch import nn

from .transformer_localdit import is_untouched

PACKED_DTYPES = (torch.float32, torch.bfloat16)
# For products of about how many tokens to lay weights out: a slab of the transformer. Others find them as good.
TOKENS = 1024


def why_not_packed(device: torch.device, dtype: torch.dtype) -> str | None:
    """
    Why weights had better stay as they are.

    Args:
        device (`torch.device`): Where to compute.
        dtype (`torch.dtype`): What to compute in.

    Returns:
        `str`, *optional*: The reason, or `None` where packed weights serve and are faster.
    """
    if device.type != "cpu":
        return f"packed weights are for CPUs, but the device is {device}"
    if dtype not in PACKED_DTYPES:
        return f"packed weights are float32 or bfloat16, but the model is in {dtype}"
    if not torch.backends.mkldnn.is_available() or not torch.cpu.get_capabilities().get("avx512_f"):
        return "packed weights need a processor with AVX-512 and a PyTorch with oneDNN"
    return None


def pack_linears(transformer: nn.Module) -> nn.Module:
    r"""
    Lays the weights of the linear layers in the blocks out for the processor, in place and for inference only. Results
    differ from those of the unpacked model by rounding at most.

    The state dict stays what it was, to the bit, and may be loaded.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]):
            A model on the CPU, or another one of diffusers' with `transformer_blocks`. LoRA layers have to be fused
            into it before.

    Returns:
        [`LocalDiTTransformer2DModel`]: The same model.

    Raises:
        `ValueError`: If packed weights do not serve where the model is, or it has LoRA layers or hooks on linears.
    """
    if reason := why_not_packed(transformer.device, transformer.dtype):
        raise ValueError(reason)
    replace_linears(transformer, [nn.Linear], PackedLinear)
    for module in list(transformer.transformer_blocks.modules()):
        for name, child in module.named_children():
            is_gelu = type(child) is GELU and child.approximate == "tanh" and is_untouched(child)
            if is_gelu and type(child.proj) is PackedLinear:
                setattr(module, name, PackedGELU(child.proj))
    return transformer


def replace_linears(transformer: nn.Module, kinds: list[type], make: Callable[[nn.Module], nn.Module]) -> None:
    """
    Puts `make(linear)` in the place of each linear layer in the blocks that is of one of `kinds` exactly and whose
    weight is no tensor of somebody's own, as torchao's are.
    """
    if getattr(transformer, "peft_config", None):
        raise ValueError("LoRA layers are in the way; call `fuse_lora()` and `unload_lora_weights()` first")
    places = [
        (module, name, child)
        for module in transformer.transformer_blocks.modules()
        for name, child in module.named_children()
        if type(child) in kinds and type(child.weight) in (nn.Parameter, torch.Tensor)
    ]
    for _, name, child in places:
        if not is_untouched(child):
            raise ValueError(
                f"a hook on the linear layer {name!r} is in the way (one's own, of layerwise casting or offloading), "
                "for the layer in its place would not call it; remove such hooks before"
            )
    for module, name, child in places:
        setattr(module, name, make(child))


class FrozenLinear(nn.Module):
    r"""
    What layers have in common that compute a linear in a way of their own, without gradients and on the CPU. Each has
    a method `pack` that takes a weight and keeps it as the processor wants it, as no tensor that a state dict, `to`, a
    copy or a device could take, and a property `weight`, `(out, in)`, of the numbers that it computes by: the state
    dict has it beside the bias.

    Args:
        linear (`torch.nn.Linear`): The layer in whose place it computes.
    """

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_dtype = linear.weight.dtype
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.pack(linear.weight.detach())

    def check(self, hidden_states: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            raise ValueError(f"{type(self).__name__} cannot be compiled; compile the model as it was before.")
        if hidden_states.device.type != "cpu" or hidden_states.requires_grad:
            raise ValueError(f"{type(self).__name__} computes on the CPU and without gradients.")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *messages) -> None:
        others = dict(state_dict)
        weight = others.pop(f"{prefix}weight", None)
        if weight is None:
            missing_keys.append(f"{prefix}weight")
        elif weight.shape != (self.out_features, self.in_features):
            messages[-1].append(
                f"{prefix}weight must be of shape {(self.out_features, self.in_features)}, not {tuple(weight.shape)}."
            )
        else:
            self.pack(weight.detach().to("cpu", self.weight_dtype))
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, *messages)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of: the weight as it is in the state dict, to be packed again."""
        return {name: value for name, value in self.__dict__.items() if name not in self.packed} | {
            "weight": self.weight
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight = state.pop("weight")
        super().__setstate__(state)
        self.pack(weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedLinear(FrozenLinear):
    r"""A linear layer through oneDNN, with its weight laid out once, and an activation of oneDNN's after it."""

    packed = ("packed_weight",)

    def pack(self, weight: torch.Tensor) -> None:
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)

    @property
    def weight(self) -> torch.Tensor:
        return self.packed_weight.to_dense()

    def check(self, hidden_states: torch.Tensor) -> None:
        super().check(hidden_states)
        if hidden_states.dtype != self.weight_dtype:
            raise ValueError(
                f"A linear layer that was packed in {self.weight_dtype} got {hidden_states.dtype}; choose the dtype"
                " before `pack_linears`."
            )

    def forward(self, hidden_states: torch.Tensor, activation: str = "none", approximate: str = "") -> torch.Tensor:
        self.check(hidden_states)
        return torch.ops.mkldnn._linear_pointwise(
            hidden_states, self.packed_weight, self.bias, activation, [], approximate
        )

    def add_to(self, other: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`other` plus what the layer gives, rounded once."""
        self.check(hidden_states)
        return torch.ops.mkldnn._linear_pointwise.binary(hidden_states, other, self.packed_weight, self.bias, "add")


class PackedGELU(GELU):
    r"""
    The tanh approximation of GELU of a packed linear layer, which oneDNN applies to sums before it rounds them.

    Args:
        proj ([`PackedLinear`]):
            The linear layer. With another one in its place, or a hook on it, GELU is computed after it.
    """

    def __init__(self, proj: nn.Module):
        super().__init__(1, 1, approximate="tanh")
        self.proj = proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if type(self.proj) is PackedLinear and is_untouched(self.proj):
            return self.proj(hidden_states, "gelu", "tanh")
        return super().forward(hidden_states)
