# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
LocalDiT: a PixArt-style diffusion transformer whose self-attention looks into shifted windows, with a global-context
branch beside the local one.

The computation is that of DATAGRID's released LocalDiT, quirks included. This file imports nothing of the package it
lies in, because the same bytes are shipped in Hub repositories as remote code.

Shape legend: B batch, H x W tokens (rows, columns), L = H * W, C width of the network, w window size, n windows,
Hp x Wp the map padded to multiples of w, T text tokens.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.activations import GELU
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_1d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.utils import apply_lora_scale
from einops import rearrange
from torch import nn

# The original masks by a large finite number: a row that is masked throughout becomes uniform instead of NaN.
MASK_VALUE = -10000.0
QK_NORM_EPS = 1e-10
LAYER_NORM_EPS = 1e-6
# Larger inputs are worked on in slabs of so many numbers: on a CPU so that what is made of one stays in its cache, on
# other devices, which want large kernels, so that what is made of all does not have to be there at once.
SLAB_NUMBERS = 1024 * 1152
GPU_SLAB_NUMBERS = 8192 * 1152
QUERY_PARTS = 8  # of a picture's queries, where a kernel of cross-attention would leave a GPU idle


class WindowGeometry(NamedTuple):
    """
    Where the tokens of an H x W map go under one window shift. Every shift has tensors of the same shapes, so that all
    blocks share one compiled graph.

    Attributes:
        map_to_token (`torch.Tensor` of shape `(Hp, Wp)`):
            the token at each place of the padded, rolled map; `L` stands for padding.
        window_to_token (`torch.Tensor` of shape `(n, w*w)`): the token of each window's members; any one for padding.
        padding (`torch.Tensor` of shape `(n, w*w)`): true where a window's member is padding.
        token_to_window (`torch.Tensor` of shape `(L,)`): the place of each token in the flattened windows.
        attention_mask (`torch.Tensor` of shape `(n, 1, w*w, w*w)`):
            0 where query and key lie in one region of the map, -10000 where the roll brought strangers together.
        relative_position (`torch.Tensor` of shape `(w*w, w*w)`): row of the relative position bias table.
        rotary_cos, rotary_sin (`torch.Tensor` of shape `(L, 1, head_dim // 2)`, *optional*): rotary table.
    """

    map_to_token: torch.Tensor
    window_to_token: torch.Tensor
    padding: torch.Tensor
    token_to_window: torch.Tensor
    attention_mask: torch.Tensor
    relative_position: torch.Tensor
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None

    def split(self, size: int | None) -> list["WindowGeometry"]:
        """Parts with as many whole rows of windows as have `size` tokens, at least one; for `None` all in one."""
        if size is None:
            return [self]
        tokens_of_row = self.map_to_token.shape[1] * math.isqrt(self.window_to_token.shape[1])
        windows = max(size // tokens_of_row, 1) * tokens_of_row // self.window_to_token.shape[1]
        return [
            self._replace(window_to_token=window_to_token, padding=padding, attention_mask=attention_mask)
            for window_to_token, padding, attention_mask in zip(
                *(x.split(windows) for x in (self.window_to_token, self.padding, self.attention_mask))
            )
        ]

    def sides(self, window_size: int) -> dict[str, int]:
        """Windows beside each other, and rows and columns of one, as `rearrange` takes them."""
        return {"c": self.map_to_token.shape[1] // window_size, "h": window_size, "w": window_size}


class TokenMapGeometry(NamedTuple):
    """
    All that depends on the size of the token map alone.

    Attributes:
        pos_embed (`torch.Tensor` of shape `(L, C)`): absolute sine-cosine position embedding.
        shifts (`tuple` of `w` [`WindowGeometry`]): one per window shift 0 .. w-1; layer i uses shift i mod w.
    """

    pos_embed: torch.Tensor
    shifts: tuple[WindowGeometry, ...]


# Geometry


def to_windows(token_map: torch.Tensor, window_size: int) -> torch.Tensor:
    """Cuts a map `(Hp, Wp)` into windows, row by row: `(n, w*w)`."""
    return rearrange(token_map, "(rows h) (columns w) -> (rows columns) (h w)", h=window_size, w=window_size)


def shifted_region(length: int, window_size: int, shift: int, device: torch.device) -> torch.Tensor:
    """
    Labels the places of a rolled axis: 0 before the last window, 1 inside it, 2 what the roll brought round from the
    start. Without a shift all places are one region.
    """
    position = torch.arange(length, device=device)
    if shift == 0:
        return torch.zeros_like(position)
    return (position >= length - window_size).long() + (position >= length - shift).long()


def relative_position_index(window_size: int, device: torch.device) -> torch.Tensor:
    """Row of the `((2w-1)^2, heads)` bias table for each pair of places in a window, as in Swin: `(w*w, w*w)`."""
    position = torch.arange(window_size, device=device)
    offset = position[:, None] - position[None, :] + window_size - 1  # (w, w), 0 .. 2w-2
    index = offset[:, None, :, None] * (2 * window_size - 1) + offset[None, :, None, :]  # query row, column, key ...
    return index.reshape(window_size**2, window_size**2)


def rotary_table(height: int, width: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines by which the interleaved pairs of a head turn: the first `head_dim / 4` pairs by column *
    theta_j, the rest by row * theta_j, theta_j = 10000^(-4j / head_dim). Two tensors `(L, 1, head_dim // 2)`.
    """
    theta = 10000.0 ** (-4.0 * torch.arange(head_dim // 4, device=device, dtype=torch.float32) / head_dim)
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None] * theta
    columns = torch.arange(width, device=device, dtype=torch.float32)[:, None] * theta
    angle = torch.cat(
        [columns[None, :, :].expand(height, -1, -1), rows[:, None, :].expand(-1, width, -1)], dim=-1
    ).reshape(height * width, 1, head_dim // 2)
    return angle.cos(), angle.sin()


def window_geometry(
    height: int,
    width: int,
    window_size: int,
    shift: int,
    rotary: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    device: torch.device,
) -> WindowGeometry:
    """Geometry of an H x W token map that is padded at the bottom and right and rolled by `(-shift, -shift)`."""
    padded_height = (height + window_size - 1) // window_size * window_size
    padded_width = (width + window_size - 1) // window_size * window_size

    row = (torch.arange(padded_height, device=device) + shift) % padded_height
    column = (torch.arange(padded_width, device=device) + shift) % padded_width
    inside = (row < height)[:, None] & (column < width)[None, :]
    map_to_token = torch.where(inside, row[:, None] * width + column[None, :], height * width)

    window_to_token = to_windows(map_to_token, window_size)
    # Each token stands once in the windows and padding (index L) comes last: sorting by token inverts the map.
    token_to_window = window_to_token.flatten().argsort(stable=True)[: height * width]

    row_region = shifted_region(padded_height, window_size, shift, device)
    column_region = shifted_region(padded_width, window_size, shift, device)
    region = to_windows(3 * row_region[:, None] + column_region[None, :], window_size)  # (n, w*w)
    attention_mask = (region[:, None, :, None] != region[:, None, None, :]) * MASK_VALUE

    return WindowGeometry(
        map_to_token,
        window_to_token.clamp(max=height * width - 1),
        window_to_token == height * width,  # no view: a compiler would look at its base, too
        token_to_window,
        attention_mask,
        relative_position_index(window_size, device),
        *rotary,
    )


def sincos_pos_embed(
    height: int, width: int, dim: int, base_size: int, interpolation_scale: float, device: torch.device
) -> torch.Tensor:
    """
    PixArt's absolute position embedding `(L, dim)`, columns in the first half: positions are stretched to `base_size`
    and divided by `interpolation_scale`. Always computed, never looked up by size, so that it compiles once.
    """
    rows = torch.arange(height, device=device, dtype=torch.float32) / (height / base_size) / interpolation_scale
    columns = torch.arange(width, device=device, dtype=torch.float32) / (width / base_size) / interpolation_scale
    rows = get_1d_sincos_pos_embed_from_grid(dim // 2, rows, output_type="pt")[:, None, :].expand(-1, width, -1)
    columns = get_1d_sincos_pos_embed_from_grid(dim // 2, columns, output_type="pt")[None, :, :].expand(height, -1, -1)
    return torch.cat([columns, rows], dim=-1).reshape(height * width, dim).float()


def token_map_geometry(
    height: int,
    width: int,
    dim: int,
    head_dim: int,
    window_size: int,
    use_rope: bool,
    base_size: int,
    interpolation_scale: float,
    device: torch.device,
) -> TokenMapGeometry:
    """Everything that a forward pass on an H x W token map needs and that is the same at each step."""
    # Not an inference tensor even when first asked for in inference mode: training may reuse it.
    with torch.inference_mode(False):
        rotary = rotary_table(height, width, head_dim, device) if use_rope else (None, None)
        pos_embed = sincos_pos_embed(height, width, dim, base_size, interpolation_scale, device)
        shifts = tuple(
            window_geometry(height, width, window_size, shift, rotary, device) for shift in range(window_size)
        )
    return TokenMapGeometry(pos_embed, shifts)


cached_token_map_geometry = functools.lru_cache(maxsize=8)(token_map_geometry)


# Slabs and steps


def keeps_nothing() -> bool:
    """Whether no gradients are kept and no graph is compiled, which decides by itself what lies where."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled())


def is_traced() -> bool:
    """Whether tensors have no numbers that one could look at."""
    return torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None


def saves_passes(hidden_states: torch.Tensor) -> bool:
    """Whether to take small steps in place: on a CPU, where every pass over memory counts."""
    return keeps_nothing() and hidden_states.device.type == "cpu"


def may_look_at(x: torch.Tensor) -> bool:
    """Whether numbers may decide what is computed: on a GPU, one would have to wait for them."""
    return saves_passes(x) and not (is_traced() or torch._C._are_functorch_transforms_active())


def slab_size(hidden_states: torch.Tensor) -> int | None:
    """How many tokens of each sample of `(B, L, C)` to work on at a time, or `None` for all at once."""
    batch_size, length, dim = hidden_states.shape
    numbers = SLAB_NUMBERS if saves_passes(hidden_states) else GPU_SLAB_NUMBERS
    size = max(numbers // (batch_size * dim), 1)
    return size if size < length and keeps_nothing() else None


def slab_by_slab(
    function: Callable[..., torch.Tensor], *tokens: torch.Tensor, overwrite: bool = False
) -> torch.Tensor:
    """
    `function(*tokens)` for a function that treats each token of one or more `(B, L, C)` on its own. With `overwrite`
    the result may lie where the first of them lay.
    """
    size = slab_size(tokens[0])
    if size is None:
        return function(*tokens)
    slabs = zip(*(x.split(size, dim=1) for x in tokens))
    first = function(*next(slabs))
    result = tokens[0]
    if not overwrite or first.dtype != result.dtype:
        result = first.new_empty(first.shape[0], result.shape[1], first.shape[2])
    # Not `torch.cat`, for which all slabs would have to be there at once.
    for place, slab in zip(result.split(size, dim=1), itertools.chain([first], itertools.starmap(function, slabs))):
        place.copy_(slab)
    return result


def may_overwrite(x: torch.Tensor, other: torch.Tensor | float) -> bool:
    """
    Whether what is made of both may lie where `x` lies, a tensor that nobody else has: on a CPU, memory that the
    system has to give anew takes several times as long as the sum that is written to it.
    """
    return keeps_nothing() and torch.result_type(x, other) == x.dtype


def add(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`x + other`, which may overwrite `x`."""
    return x.add_(other) if may_overwrite(x, other) else x + other


def multiply(x: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """`x * factor`, which may overwrite `x`."""
    return x.mul_(factor) if may_overwrite(x, factor) else x * factor


def add_product(linear: nn.Module, tokens: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`linear(tokens) + other`, in one step by a linear that has one for it, as packed ones have."""
    if hasattr(linear, "add_to") and is_untouched(linear):
        return linear.add_to(other, tokens)
    return add(linear(tokens), other)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` if it is in half precision, else `x` itself: steps are then computed in it, and rounded once."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_hooked(module: nn.Module) -> bool:
    """
    Whether somebody expects to be told of each call of the module, one in a forward pass: diffusers' caches,
    accelerate's offloading (which brings the weights then), or hooks of a user.
    """
    told = hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook")
    return told or bool(module._forward_hooks or module._forward_pre_hooks)


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody has put something around a module's `forward` or in its place, as some adapters do."""
    hooks = module._backward_hooks or module._backward_pre_hooks or is_hooked(module)
    return not hooks and "forward" not in module.__dict__


def is_plain(linear: nn.Module, hidden_states: torch.Tensor) -> bool:
    """
    Whether a linear may be computed from its weight without calling it: it has no adapter, no quantised weight and no
    hook, and the weight is where the tokens are and in their dtype (layerwise casting and offloading see to that in
    the call), or autocast makes it so.
    """
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or not is_untouched(linear):
        return False
    device, dtype = linear.weight.device, linear.weight.dtype
    cast = dtype == torch.float32 and torch.is_autocast_enabled(device.type)
    return device == hidden_states.device and (cast or dtype == hidden_states.dtype)


def scatter_windows(parts: list[WindowGeometry], windows: Iterator[torch.Tensor], length: int) -> torch.Tensor:
    """Tokens `(B, L, C)` of `windows`, `(B, n*w*w, C)` for each part, one part at a time."""
    tokens = None
    for part, values in zip(parts, windows):
        places, padding = part.window_to_token.flatten(), part.padding.flatten()
        if padding.any():
            places, values = places[~padding], values[:, ~padding]
        if tokens is None:
            tokens = values.new_empty(values.shape[0], length, values.shape[2])
        for sample, sample_values in zip(tokens, values):  # along the first dimension it is twenty times as fast
            sample.index_copy_(0, places, sample_values)
    return tokens


def without_padding(
    text: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Text `(B, T, channels)` and its mask `(B, T)`, 0 for tokens to leave out, without the tokens after the last one
    that any sample attends to, and without the mask if it then leaves out none. Masked tokens have a weight of exactly
    zero in attention, unless a sample has no others: then all stays as it is.
    """
    if attention_mask is None or not attention_mask.any(dim=1).all():
        return text, attention_mask
    length = int(attention_mask.any(dim=0).nonzero().max()) + 1
    text, attention_mask = text[:, :length], attention_mask[:, :length]
    return text, None if (attention_mask == 1).all() else attention_mask


def one_if_alike(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The first row of each if all of its rows are the same, as timesteps and sizes of a guided batch are."""
    alike = all(rows.shape[0] == 1 or (rows == rows[:1]).all() for rows in tensors)
    return [rows[:1] for rows in tensors] if alike else list(tensors)


class LocalDiTStepCache:
    r"""
    Keeps what forward passes compute from text and picture size alone (projected text, keys, values and mask of
    cross-attention, size embeddings) from the first denoising step for the others. One object serves one set of
    `encoder_hidden_states`, `encoder_attention_mask`, `added_cond_kwargs` and weights.

    A class of its own, since hooks that move inputs between devices copy containers.
    """

    def __init__(self):
        self._values = {}

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What is kept under `key`, computed if it is asked for the first time."""
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]


def once(cache: LocalDiTStepCache | None, key: Any, compute: Callable[[], Any]) -> Any:
    """`compute()`, or what it was in an earlier step if there is a cache."""
    return compute() if cache is None else cache.get(key, compute)


# Attention


def apply_rotary(hidden_states: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    """
    Turns the interleaved pairs (a, b) of `(..., L, heads, head_dim)` to (a cos - b sin, a sin + b cos), which may
    overwrite them. The tables are `(L, 1, head_dim // 2)`, or `None` for no turn.
    """
    if cos is None or sin is None:
        return hidden_states
    pairs = at_least_float32(hidden_states).unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        # One pass over memory. Compilers fuse the lines below, but do not know complex numbers.
        turned = multiply(torch.view_as_complex(pairs), torch.complex(cos, sin))
        return torch.view_as_real(turned).flatten(-2).to(hidden_states.dtype)
    a, b = pairs.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(hidden_states.dtype)


def window_attention_bias(table: torch.Tensor, geometry: WindowGeometry, batch_size: int) -> torch.Tensor:
    """Relative position bias, of a table `((2w-1)^2, heads)`, plus region mask: `(B*n, heads, w*w, w*w)`."""
    bias = table[geometry.relative_position].permute(2, 0, 1).contiguous()  # (heads, w*w, w*w)
    bias = bias + geometry.attention_mask.to(table.dtype)  # (n, heads, w*w, w*w)
    return bias[None].expand(batch_size, -1, -1, -1, -1).flatten(0, 1)


def explicit_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Attention on `(batch, length, heads, head_dim)`, operation by operation."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2)
    scores = scores * scale if bias is None else torch.add(bias, scores, alpha=scale)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def is_function_mode_on() -> bool:
    """Whether functions of PyTorch are taken over, as diffusers' layer skipping does with fused attention."""
    return not torch.compiler.is_compiling() and torch._C._is_torch_function_mode_enabled()


def attention(
    processor: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """
    Attention on `(batch, length, heads, head_dim)` through the backend of `processor`.

    By default not through PyTorch's fused kernels where they lose on a CPU: for as few queries as a window has, in
    float32 (in half precision they keep the scores in float32); in training with a bias that is trained too, for which
    there is none (what is done instead takes half as long again); and in training in half precision, for its backward
    pass is several times slower than plain operations.
    """
    # In a compiled graph lengths are symbols, of which one graph serves all.
    window = not torch.compiler.is_compiling() and query.shape[1] <= 64 and query.dtype == torch.float32
    half = query.requires_grad and query.dtype != torch.float32
    trained_bias = bias is not None and bias.requires_grad
    chosen = processor._attention_backend is not None or is_function_mode_on()
    if (window or half or trained_bias) and query.device.type == "cpu" and not chosen:
        return explicit_attention(query, key, value, bias)
    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=bias,
        dropout_p=0.0,  # as by default, but without a value here Dynamo fails at this call in a checkpointed block
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )


def query_parts(processor: Any, query: torch.Tensor) -> int:
    """
    Into how many samples to cut the `(B, L, heads, head_dim)` queries of one. The backward kernels of GPUs start a
    program for each sample, head and block of keys, 64 in cuDNN's: for a text that is two for each head, which go
    through all queries while most of the GPU has nothing to do.
    """
    batch_size, length, heads, _ = query.shape
    trained = query.is_cuda and query.requires_grad and processor._parallel_config is None
    idle = trained and batch_size * heads <= 128 and length >= 128 * QUERY_PARTS
    return QUERY_PARTS if idle and length % QUERY_PARTS == 0 else 1


def text_attention(
    processor: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """
    `attention` of many queries to few keys. Keys, values and the bias `(B, 1, 1, T)`, if there is one, may be of one
    sample for all.
    """
    parts = query_parts(processor, query)
    if parts == 1:
        return attention(processor, query, key, value, bias)
    key, value, bias = (
        x if x is None else x.expand(query.shape[0], -1, -1, -1).repeat_interleave(parts, dim=0)
        for x in (key, value, bias)
    )
    query = query.unflatten(1, (parts, -1)).flatten(0, 1)  # (B*parts, L/parts, heads, head_dim)
    return attention(processor, query, key, value, bias).unflatten(0, (-1, parts)).flatten(1, 2)


def pad_keys(
    key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Keys and values `(B, T, heads, head_dim)` and the bias `(B, 1, 1, T)` for `attention` on a CPU, with as many keys
    more, of no weight, as make whole vectors of a query's scores: the last numbers of a row, which PyTorch's kernel
    takes one by one, can take as long as all others.
    """
    length = key.shape[1]
    padding = -length % (16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8)
    if padding == 0:
        return key, value, bias
    bias = key.new_zeros(1, 1, 1, length) if bias is None else bias
    key, value = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (key, value))
    return key, value, F.pad(bias, (0, padding), value=-torch.inf)


class LocalDiTWindowAttnProcessor:
    r"""
    Shifted-window attention with an optional global-context branch, through `scaled_dot_product_attention` (or the
    attention backend that diffusers was told to use; backends that refuse masks cannot serve).

    Stateless: the parameters are those of the attention module, the geometry is an argument.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "LocalDiTWindowAttention", hidden_states: torch.Tensor, geometry: WindowGeometry
    ) -> torch.Tensor:
        size = slab_size(hidden_states)
        parts = geometry.split(size)  # of n windows
        context = attn.global_context
        query_maps, keys, outputs = [], [], []
        for part in parts:
            query_map, key, output = self._attend_locally(attn, *self._project(attn, hidden_states, part), part)
            outputs.append(output)
            if context is not None:
                query_maps.append(query_map)  # (B, rows, Wp, C)
                keys.append(key)

        if context is not None:
            query_maps, context_bias = context(query_maps)
            for i, (part, query_map, key) in enumerate(zip(parts, query_maps, keys)):
                # Keys and values are both read from the rotated keys; padding (zeros) contributes the linear's bias.
                key, value = context.to_k(key), context.to_v(key)
                outputs[i] = self._join_context(attn, outputs[i], query_map, key, value, context_bias, part)

        outputs = [output.flatten(1, 2) for output in outputs]  # (B, n*w*w, C)
        if size is not None and saves_passes(hidden_states):
            return scatter_windows(parts, map(attn.to_out[0], outputs), hidden_states.shape[1])
        outputs = outputs[0] if size is None else torch.cat(outputs, dim=1)
        return attn.to_out[0](outputs.index_select(1, geometry.token_to_window))  # (B, L, C)

    @staticmethod
    def _project(attn, hidden_states, geometry: WindowGeometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of windows, `(B, n, w*w, C)`, of padding anything."""
        windows = hidden_states.index_select(1, geometry.window_to_token.flatten())
        return attn.project(windows.unflatten(1, geometry.window_to_token.shape))

    @staticmethod
    def _prepare(attn, query, key, value, geometry: WindowGeometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query and key with norm and rotary embedding, and value; zeros for padding."""
        # A compiled graph serves maps with padding and without.
        if torch.compiler.is_compiling() or geometry.map_to_token.numel() > geometry.token_to_window.numel():
            query, key, value = (x.masked_fill(geometry.padding.unsqueeze(-1), 0) for x in (query, key, value))
        tokens = geometry.window_to_token.flatten()
        rotary = [x if x is None else x.index_select(0, tokens) for x in (geometry.rotary_cos, geometry.rotary_sin)]

        def turn(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
            # On a CPU half precision is widened once for both steps, and rounded after them.
            saves = saves_passes(x)
            heads = (at_least_float32(x) if saves else x).unflatten(-1, (attn.heads, -1))
            turned = apply_rotary(norm(heads).flatten(1, 2), *rotary)  # (B, n*w*w, heads, head_dim)
            return (turned.to(x.dtype) if saves else turned).view_as(x)

        return turn(attn.norm_q, query), turn(attn.norm_k, key), value

    def _attend_locally(self, attn, query, key, value, geometry: WindowGeometry):
        """For the context, if there is one, queries on the map `(B, rows, Wp, C)`; keys and output of the windows."""
        query, key, value = self._prepare(attn, query, key, value, geometry)
        query_map = None
        if attn.global_context is not None:
            query_map = rearrange(query, "b (r c) (h w) d -> b (r h) (c w) d", **geometry.sides(attn.window_size))
        return query_map, key, self._attend(attn, query, key, value, attn.rel_pos_bias, geometry)

    def _join_context(self, attn, output, query_map, key, value, bias_table, geometry: WindowGeometry) -> torch.Tensor:
        """Mean of the local branch's output and that of the context branch, `(B, n, w*w, C)`."""
        query = rearrange(query_map, "b (r h) (c w) d -> b (r c) (h w) d", **geometry.sides(attn.window_size))
        return multiply(add(output, self._attend(attn, query, key, value, bias_table, geometry)), 0.5)

    def _attend(self, attn, query, key, value, bias_table, geometry: WindowGeometry) -> torch.Tensor:
        """Attention in each window, `(B, n, w*w, C)`."""
        batch_size = query.shape[0]
        query, key, value = (x.flatten(0, 1).unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        bias = window_attention_bias(bias_table, geometry, batch_size).to(query.dtype)
        output = attention(self, query, key, value, bias)  # (B*n, w*w, heads, head_dim)
        return output.flatten(2).unflatten(0, (batch_size, -1))


class LocalDiTCrossAttnProcessor:
    r"""Attention from image to text tokens with per-head RMSNorm on query and key."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "LocalDiTCrossAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        step_cache: LocalDiTStepCache | None = None,
    ) -> torch.Tensor:
        batch_size = encoder_hidden_states.shape[0]
        chosen = self._attention_backend is not None or self._parallel_config is not None or is_function_mode_on()
        pads = saves_passes(hidden_states) and not chosen

        def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            key, value = (x.unflatten(-1, (attn.heads, -1)) for x in attn.project_text(encoder_hidden_states))
            key = attn.norm_k(key)  # (B, T, heads, head_dim)
            return pad_keys(key, value, attention_mask) if pads else (key, value, attention_mask)

        key, value, bias = once(step_cache, (attn, batch_size), text)

        def attend(tokens: torch.Tensor) -> torch.Tensor:
            query = attn.norm_q(attn.to_q(tokens).unflatten(-1, (attn.heads, -1)))  # (B, L, heads, head_dim)
            output = text_attention(self, query, key, value, bias)
            return attn.to_out[0](output.flatten(2))

        return slab_by_slab(attend, hidden_states)


class GlobalContextQueryStage(nn.Module):
    r"""x + pointwise(SE(GELU(depthwise(x)))), SE being a squeeze-and-excitation over the padded map; exact GELUs."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.squeeze = nn.Linear(dim, dim // 4, bias=False)
        self.excite = nn.Linear(dim // 4, dim, bias=False)
        self.pointwise = nn.Linear(dim, dim, bias=False)

    def gate(self, mean: torch.Tensor) -> torch.Tensor:
        """The excitation for the mean of the features, both `(B, C)`."""
        return torch.sigmoid(self.excite(F.gelu(self.squeeze(mean))))

    def forward(self, query_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Takes the map in parts `(B, rows, Wp, C)`, one below the other, and returns it likewise."""
        features = [self.features(query_maps, i) for i in range(len(query_maps))]
        rows = sum(part.shape[1] for part in features)
        mean = sum(part.mean(dim=(1, 2)) * (part.shape[1] / rows) for part in features)  # (B, C)
        gate = self.gate(mean)[:, None, None]  # (B, 1, 1, C)
        for i, query in enumerate(query_maps):
            features[i] = add_product(self.pointwise, multiply(features[i], gate), query)
        return features

    def features(self, query_maps: list[torch.Tensor], index: int) -> torch.Tensor:
        """GELU(depthwise(x)) of one part, which needs a row of each neighbour."""
        above = [part[:, -1:] for part in query_maps[max(index - 1, 0) : index]]
        below = [part[:, :1] for part in query_maps[index + 1 : index + 2]]
        part = query_maps[index]
        if above or below:
            part = torch.cat([*above, part, *below], dim=1)
        features = self.depthwise(part.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.gelu(features[:, len(above) : features.shape[1] - len(below)])


class LocalDiTGlobalContext(nn.Module):
    r"""Parameters of the global-context branch: queries through convolutions, keys and values read from the keys."""

    def __init__(self, dim: int, heads: int, window_size: int):
        super().__init__()
        self.rel_pos_bias = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, heads))
        self.query_stages = nn.ModuleList([GlobalContextQueryStage(dim) for _ in range(2)])
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)

    def forward(self, query_maps: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """
        Takes the map of queries, in parts `(B, rows, Wp, C)`, through the stages, and gives the bias table besides:
        offloading brings a module's weights when it is called, and takes them away again, so that it is a copy.
        """
        for stage in self.query_stages:
            query_maps = stage(query_maps)
        return query_maps, self.rel_pos_bias.clone()


class LocalDiTRMSNorm(nn.RMSNorm):
    r"""
    `nn.RMSNorm`, which may overwrite its input: PyTorch's makes five passes on a CPU, most through fresh memory. Gives
    the dtype that it gets, also float32 with a weight in half precision.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        if not saves_passes(x) or dtype != torch.promote_types(dtype, self.weight.dtype):
            return super().forward(x)
        x = at_least_float32(x)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return x.mul_(scale).mul_(self.weight).to(dtype)


class LocalDiTAttention(nn.Module, AttentionModuleMixin):
    r"""What self- and cross-attention have in common: projections with per-head norms on query and key."""

    use_bias = True
    is_cross_attention = False

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q = LocalDiTRMSNorm(dim // heads, eps=QK_NORM_EPS)
        self.norm_k = LocalDiTRMSNorm(dim // heads, eps=QK_NORM_EPS)
        self.set_processor(self._default_processor_cls())


class LocalDiTWindowAttention(LocalDiTAttention):
    r"""
    Self-attention of LocalDiT. It adds its own input to what the processor returns: `attn(x) + x`.

    Args:
        dim (`int`): Width of the network.
        heads (`int`): Number of heads.
        window_size (`int`): Side of a window in tokens.
        use_global_context (`bool`): Whether the global-context branch is there.
    """

    _default_processor_cls = LocalDiTWindowAttnProcessor
    _available_processors = [LocalDiTWindowAttnProcessor]

    def __init__(self, dim: int, heads: int, window_size: int, use_global_context: bool):
        super().__init__(dim, heads)
        self.window_size = window_size
        self.rel_pos_bias = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, heads))
        self.global_context = LocalDiTGlobalContext(dim, heads, window_size) if use_global_context else None
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of the tokens, each `(B, L, C)`."""
        if self.fused_projections:
            return self.to_qkv(hidden_states).chunk(3, dim=-1)
        return self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)

    def forward(self, hidden_states: torch.Tensor, geometry: WindowGeometry) -> torch.Tensor:
        return add(self.processor(self, hidden_states, geometry), hidden_states)


class LocalDiTCrossAttention(LocalDiTAttention):
    r"""Cross-attention of LocalDiT, from image tokens to the projected text tokens."""

    _default_processor_cls = LocalDiTCrossAttnProcessor
    _available_processors = [LocalDiTCrossAttnProcessor]
    is_cross_attention = True

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def project_text(self, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of the text, each `(B, T, C)`."""
        if self.fused_projections:
            return self.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        return self.to_k(encoder_hidden_states), self.to_v(encoder_hidden_states)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        step_cache: LocalDiTStepCache | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, step_cache)


# Block and model


def may_modulate(norm: nn.Module, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether shift and scale may be the weights that a norm itself has not, which saves a pass on a CPU."""
    built = type(norm) is nn.LayerNorm and norm.weight is None and is_untouched(norm)
    return built and saves_passes(hidden_states) and hidden_states.dtype == shift.dtype == scale.dtype


def modulate(norm: nn.Module, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """norm(h) * (1 + scale) + shift, these being `(B, 1, C)`, or `(1, 1, C)` for all samples."""
    if not may_modulate(norm, hidden_states, shift, scale):
        return slab_by_slab(lambda tokens: torch.addcmul(shift, norm(tokens), 1 + scale), hidden_states)
    weights, biases = (1 + scale).squeeze(1), shift.squeeze(1)

    def normed(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(tokens, norm.normalized_shape, weight, bias, norm.eps)

    if weights.shape[0] == 1:
        return normed(hidden_states, weights[0], biases[0])
    return slab_by_slab(lambda tokens: torch.stack([*map(normed, tokens, weights, biases)]), hidden_states)


def gelu_tanh_(hidden_states: torch.Tensor) -> torch.Tensor:
    """
    The tanh approximation of GELU in place, as x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): a sigmoid takes a CPU
    half the time of a tanh.
    """
    scale = hidden_states.new_tensor(2 * (2 / math.pi) ** 0.5, dtype=torch.float64)
    for rows in hidden_states.flatten(0, -2).split(64):  # what a few rows make stays in the nearest cache
        x = at_least_float32(rows)
        rows.copy_(x.mul_(torch.addcmul(scale, x, x, value=0.044715 * scale.item()).mul_(x).sigmoid_()))
    return hidden_states


def widens_tokens(widen: nn.Module, dropout: nn.Module) -> bool:
    """Whether a feed-forward's GELU treats each token on its own, and nobody expects to be told of its calls."""
    built = isinstance(widen, GELU) and widen.approximate == "tanh" and type(dropout) is nn.Dropout
    return built and is_untouched(widen) and is_untouched(dropout)


def widened(widen: GELU, hidden_states: torch.Tensor) -> torch.Tensor:
    """The GELU of its linear layer, in place, or as a GELU of another kind computes it."""
    return gelu_tanh_(widen.proj(hidden_states)) if type(widen) is GELU else widen(hidden_states)


def may_fuse_gelu(hidden_states: torch.Tensor, widen: nn.Module) -> bool:
    """Whether cuBLAS may apply the GELU to what a linear gives, which saves two passes over it; it has no gradient."""
    half = hidden_states.dtype in (torch.float16, torch.bfloat16)
    if not (hidden_states.is_cuda and half and type(widen) is GELU) or torch.is_grad_enabled():
        return False
    # No autocast: PyTorch has none for this operator.
    return is_plain(widen.proj, hidden_states) and widen.proj.weight.dtype == hidden_states.dtype


class LocalDiTFeedForward(FeedForward):
    r"""diffusers' feed-forward with a tanh-approximate GELU; large inputs on a CPU in slabs, widened in place."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        widen, dropout, narrow = self.net
        if not widens_tokens(widen, dropout):
            return super().forward(hidden_states)
        if may_fuse_gelu(hidden_states, widen):
            return self._fused(hidden_states)
        if not saves_passes(hidden_states) or hidden_states.numel() < SLAB_NUMBERS // 2:
            return super().forward(hidden_states)
        # Allocating four times the width of the network anew costs as much as the GELU.
        return slab_by_slab(lambda slab: narrow(widened(widen, slab)), hidden_states)

    def _fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        widen, _, narrow = self.net
        rows = torch._addmm_activation(
            widen.proj.bias, hidden_states.flatten(0, -2), widen.proj.weight.T, use_gelu=True
        )  # on a GPU the tanh approximation
        return narrow(rows.unflatten(0, hidden_states.shape[:-1]))


class LocalDiTTransformerBlock(nn.Module):
    r"""
    PixArt's block (`ada_norm_single`) around LocalDiT's self-attention:

        h = h + gate * attn(modulate(norm(h)))
        h = h + cross_attn(h, text)
        h = h + gate * ff(modulate(norm(h)))
    """

    def __init__(self, dim: int, heads: int, window_size: int, use_global_context: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.attn = LocalDiTWindowAttention(dim, heads, window_size, use_global_context)
        self.cross_attn = LocalDiTCrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.ff = LocalDiTFeedForward(dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        geometry: WindowGeometry,
        step_cache: LocalDiTStepCache | None = None,
    ) -> torch.Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.scale_shift_table[None] + modulation  # (B, 6, C)
        ).chunk(6, dim=1)  # (B, 1, C) each

        if slab_size(hidden_states) is not None and step_cache is None:
            step_cache = LocalDiTStepCache()  # for the slabs

        attn_output = self.attn(modulate(self.norm1, hidden_states, shift_msa, scale_msa), geometry)  # (B, L, C)

        def rest(attn_output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
            hidden_states = torch.addcmul(hidden_states, gate_msa, attn_output)
            hidden_states = hidden_states + self.cross_attn(
                hidden_states, encoder_hidden_states, encoder_attention_mask, step_cache
            )
            normed = modulate(self.norm2, hidden_states, shift_mlp, scale_mlp)
            return torch.addcmul(hidden_states, gate_mlp, self.ff(normed))

        if is_hooked(self.cross_attn) or is_hooked(self.ff):
            return rest(attn_output, hidden_states)
        return slab_by_slab(rest, attn_output, hidden_states, overwrite=not is_hooked(self.attn))


# diffusers' hooks for caching and skipping look block and processor up here. `register` would import every model that
# diffusers has.
TransformerBlockRegistry._registry[LocalDiTTransformerBlock] = TransformerBlockMetadata(
    return_hidden_states_index=0, return_encoder_hidden_states_index=None, _cls=LocalDiTTransformerBlock
)
AttentionProcessorRegistry._registry[LocalDiTWindowAttnProcessor] = AttentionProcessorMetadata(
    skip_processor_output_fn=lambda attn, hidden_states, geometry: hidden_states
)


class LocalDiTPatchEmbed(nn.Module):
    r"""Patches of a latent as tokens, with an absolute position embedding added."""

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latent: torch.Tensor, pos_embed: torch.Tensor) -> torch.Tensor:
        # With channels last in memory the result lies as (B, L, C) already: there is nothing to copy.
        # This is `torch.channels_last`, which `vmap` does not know.
        latent = latent.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        patches = self.proj(latent)
        tokens = patches.flatten(2).transpose(1, 2).contiguous()  # (B, L, C)
        return (tokens + pos_embed).to(tokens.dtype)


class LocalDiTTransformer2DModel(
    ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin
):
    r"""
    The transformer of LocalDiT: PixArt's diffusion transformer with shifted-window self-attention and a global-context
    branch, as released by DATAGRID.

    Where no gradients are wanted, results overwrite what is not needed any more. A forward hook of one's own that
    keeps what a layer inside a block returns must therefore clone it, or call the model with gradients, and so must an
    attention processor of one's own that keeps what it returns.

    Args:
        num_attention_heads (`int`, defaults to `16`): Number of heads of every attention.
        attention_head_dim (`int`, defaults to `72`):
            Channels of a head, a multiple of 4. `num_attention_heads * attention_head_dim` must be a multiple of 12.
        in_channels (`int`, defaults to `4`): Channels of the latent.
        out_channels (`int`, defaults to `4`): Channels of the output.
        num_layers (`int`, defaults to `18`): Number of blocks. Block i shifts its windows by i modulo `window_size`.
        patch_size (`int`, defaults to `2`): Side of a patch in latent pixels.
        caption_channels (`int`, defaults to `4096`): Channels of the text embeddings.
        sample_size (`int`, defaults to `128`):
            Side of the latents that the model was trained on (pixels / 8). Sets the base grid of the position
            embedding.
        interpolation_scale (`float`, *optional*):
            Divisor of the positions of the position embedding. By default `max(sample_size // 64, 1)`, PixArt's rule.
        window_size (`int`, defaults to `4`): Side of an attention window in tokens.
        use_global_context (`bool`, defaults to `True`): Whether self-attention has the global-context branch.
        use_rope (`bool`, defaults to `True`): Whether self-attention turns query and key by rotary embedding.

    Raises:
        `ValueError`: If a size is not positive, or the head size or width is not a multiple as required above.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LocalDiTTransformerBlock", "LocalDiTPatchEmbed"]
    _repeated_blocks = ["LocalDiTTransformerBlock"]
    # A convolution keeps its weight for the backward pass, in which layerwise casting has narrowed it again.
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single", "depthwise"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 4,
        num_layers: int = 18,
        patch_size: int = 2,
        caption_channels: int = 4096,
        sample_size: int = 128,
        interpolation_scale: float | None = None,
        window_size: int = 4,
        use_global_context: bool = True,
        use_rope: bool = True,
    ):
        super().__init__()
        for name, size in self.config.items():
            if isinstance(size, int) and not isinstance(size, bool) and size < 1:
                raise ValueError(f"`{name}` must be at least 1 but is {size}.")
        dim = num_attention_heads * attention_head_dim
        if attention_head_dim % 4 != 0:
            raise ValueError(
                f"`attention_head_dim` must be a multiple of 4 (rotary embedding turns pairs by column and by row) but"
                f" is {attention_head_dim}."
            )
        if dim % 12 != 0:
            raise ValueError(
                f"`num_attention_heads * attention_head_dim` must be a multiple of 12 (position and size embeddings"
                f" share it) but is {dim}."
            )
        if interpolation_scale is None:
            interpolation_scale = max(sample_size // 64, 1)
        self.interpolation_scale = interpolation_scale

        self.pos_embed = LocalDiTPatchEmbed(patch_size, in_channels, dim)
        self.adaln_single = AdaLayerNormSingle(dim, use_additional_conditions=True)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            [
                LocalDiTTransformerBlock(dim, num_attention_heads, window_size, use_global_context)
                for _ in range(num_layers)
            ]
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * out_channels)

        self.gradient_checkpointing = False

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict=None, **kwargs):
        r"""
        Loads an original checkpoint. As in diffusers, but the configuration is read from the file itself unless
        `config` is given; `window_size`, `sample_size`, `use_rope` and `global_context` say what no file can tell.
        """
        if kwargs.get("config") is None:  # diffusers would guess another repository for it
            kwargs.setdefault("original_config", {})
        return super().from_single_file(pretrained_model_link_or_path_or_dict, **kwargs)

    def set_attn_processor(self, processor):
        r"""
        Sets the processors that compute attention.

        Args:
            processor (`object` or `dict[str, object]`):
                One processor for every **self**-attention (cross-attention keeps its own, since its inputs differ), or
                a `dict` with the keys of `attn_processors`.
        """
        if not isinstance(processor, dict):
            processor = {
                name: processor if name.endswith(".attn.processor") else current
                for name, current in self.attn_processors.items()
            }
        super().set_attn_processor(processor)

    def make_step_cache(self) -> LocalDiTStepCache:
        r"""Makes a `step_cache` for calls of `forward` that differ in `hidden_states` and `timestep` alone."""
        return LocalDiTStepCache()

    def _embed_timestep(
        self,
        timestep: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor],
        dtype: torch.dtype,
        step_cache: LocalDiTStepCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`adaln_single`, whose embedding of the picture size can be kept: `(B, 6, C)` and `(B, C)`."""
        embedder = self.adaln_single.emb

        def embed_sizes() -> torch.Tensor:
            embeddings = [
                embed(embedder.additional_condition_proj(sizes.flatten()).to(dtype)).reshape(sizes.shape[0], -1)
                for sizes, embed in (
                    (added_cond_kwargs["resolution"], embedder.resolution_embedder),
                    (added_cond_kwargs["aspect_ratio"], embedder.aspect_ratio_embedder),
                )
            ]
            return torch.cat(embeddings, dim=1)  # (B, C) or (1, C)

        embedded_timestep = embedder.timestep_embedder(embedder.time_proj(timestep).to(dtype))
        embedded_timestep = embedded_timestep + once(step_cache, "sizes", embed_sizes)
        modulation = self.adaln_single.linear(self.adaln_single.silu(embedded_timestep))
        return modulation.unflatten(1, (6, -1)), embedded_timestep

    def _geometry(self, height: int, width: int, device: torch.device) -> TokenMapGeometry:
        config = self.config
        # A compiled graph computes it; a cache would tie the graph to one size, and hand fake tensors to later calls.
        build = token_map_geometry if is_traced() else cached_token_map_geometry
        return build(
            height,
            width,
            dim=config.num_attention_heads * config.attention_head_dim,
            head_dim=config.attention_head_dim,
            window_size=config.window_size,
            use_rope=config.use_rope,
            base_size=config.sample_size // config.patch_size,
            interpolation_scale=self.interpolation_scale,
            device=device,
        )

    @property
    def _has_compiled_blocks(self) -> bool:
        return self.transformer_blocks[0]._compiled_call_impl is not None

    def _mark_dynamic(self, *block_inputs: Any) -> None:
        """
        Tells a compiler of single blocks which sizes vary. Without this, sizes that happen to be equal on the first
        call are taken to be one.
        """
        if torch.compiler.is_compiling() or not self._has_compiled_blocks:
            return
        for value in block_inputs:
            tensors = value if isinstance(value, tuple) else (value,)
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.dim())))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor],
        encoder_attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        step_cache: LocalDiTStepCache | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Predicts the noise in a batch of latents.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`):
                Noisy latents. Height and width may be any multiples of `patch_size`.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, text_tokens, caption_channels)`):
                Text embeddings.
            timestep (`torch.Tensor` of shape `(batch,)`): Denoising timesteps, 0 to 999.
            added_cond_kwargs (`dict[str, torch.Tensor]`):
                `resolution` of shape `(batch, 2)`: height and width in image pixels; `aspect_ratio` of shape
                `(batch, 1)`: width / height, as LocalDiT was trained (PixArt's pipelines use height / width). One row
                does for a batch of one size.
            encoder_attention_mask (`torch.Tensor` of shape `(batch, text_tokens)`, *optional*):
                1 for text tokens to attend to, 0 for those to leave out (by adding -10000 to their scores).
            attention_kwargs (`dict`, *optional*): `scale` sets the weight of LoRA layers.
            step_cache (`LocalDiTStepCache`, *optional*):
                What `make_step_cache` made, the same for all denoising steps of one sampling: text and sizes are then
                embedded at the first step only. Make a new one whenever `encoder_hidden_states`,
                `encoder_attention_mask`, `added_cond_kwargs`, `attention_kwargs` or a weight changes. Without effect
                where gradients are kept and in compiled graphs.
            return_dict (`bool`, defaults to `True`): Whether to return a [`Transformer2DModelOutput`].

        Returns:
            [`Transformer2DModelOutput`] with `sample` of shape `(batch, out_channels, height, width)`, or a tuple with
            that tensor.

        Raises:
            `ValueError`: If height or width is not a multiple of `patch_size`, `added_cond_kwargs` lacks an entry,
            `encoder_attention_mask` does not have a number for each text token, or an input has neither one row nor a
            row for each of the batch.
        """
        latent_height, latent_width = hidden_states.shape[-2:]
        patch_size = self.config.patch_size
        if latent_height % patch_size != 0 or latent_width % patch_size != 0:
            raise ValueError(
                f"`hidden_states` must have a height and width that are multiples of the patch size {patch_size} but"
                f" has {latent_height} x {latent_width}."
            )
        if added_cond_kwargs is None or not {"resolution", "aspect_ratio"} <= added_cond_kwargs.keys():
            raise ValueError("`added_cond_kwargs` must hold `resolution` (batch, 2) and `aspect_ratio` (batch, 1).")
        mask_shape = None if encoder_attention_mask is None else encoder_attention_mask.shape
        if mask_shape is not None and (len(mask_shape) != 2 or mask_shape[1] != encoder_hidden_states.shape[1]):
            raise ValueError(
                f"`encoder_attention_mask` must have the shape (batch, text_tokens), here"
                f" {tuple(encoder_hidden_states.shape[:2])}, but has {tuple(mask_shape)}."
            )
        batch_size = hidden_states.shape[0]
        for name, value in {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "timestep": timestep,
            "resolution": added_cond_kwargs["resolution"],
            "aspect_ratio": added_cond_kwargs["aspect_ratio"],
        }.items():
            if value is not None and (value.ndim == 0 or value.shape[0] not in (1, batch_size)):
                raise ValueError(
                    f"`{name}` must have a row for each of the {batch_size} `hidden_states`, or one for all, but has"
                    f" the shape {tuple(value.shape)}."
                )
        height, width = latent_height // patch_size, latent_width // patch_size
        geometry = self._geometry(height, width, hidden_states.device)

        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self._has_compiled_blocks:
            step_cache = None

        # 1. Input
        if may_look_at(hidden_states) and not self._has_compiled_blocks:
            encoder_hidden_states, encoder_attention_mask = without_padding(
                encoder_hidden_states, encoder_attention_mask
            )
            timestep, resolution, aspect_ratio = one_if_alike(
                timestep, added_cond_kwargs["resolution"], added_cond_kwargs["aspect_ratio"]
            )
            added_cond_kwargs = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        hidden_states = self.pos_embed(hidden_states, geometry.pos_embed)  # (B, L, C)
        modulation, embedded_timestep = self._embed_timestep(
            timestep, added_cond_kwargs, hidden_states.dtype, step_cache
        )
        # By batch size, since FasterCache leaves out the unconditional half of the batch in some steps.
        text = once(
            step_cache, ("text", batch_size), lambda: self.caption_projection(encoder_hidden_states)
        )  # (B, T, C)
        if encoder_attention_mask is not None:
            encoder_attention_mask = (1 - encoder_attention_mask.to(hidden_states.dtype)) * MASK_VALUE
            encoder_attention_mask = encoder_attention_mask[:, None, None, :]  # (B, 1, 1, T)

        # 2. Blocks
        for i, block in enumerate(self.transformer_blocks):
            inputs = (
                hidden_states,
                text,
                modulation,
                encoder_attention_mask,
                geometry.shifts[i % self.config.window_size],
                step_cache,
            )
            self._mark_dynamic(*inputs)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden_states = block(*inputs)

        # 3. Output
        shift, scale = (self.scale_shift_table[None] + embedded_timestep[:, None]).chunk(2, dim=1)  # (B, 1, C)
        hidden_states = self.proj_out(modulate(self.norm_out, hidden_states, shift, scale))  # (B, L, p*p*out)
        output = rearrange(
            hidden_states, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=patch_size, q=patch_size
        )

        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)
