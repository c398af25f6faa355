"""
The released checkpoint's layout and ours: one table of names, read in both directions.

A row says that an original tensor is the concatenation (along dimension 0) of some of ours. *Dead* tensors are in the
file although the original never computes with them: each equals in meaning tensors that are alive, so it is dropped on
the way here and written from those on the way back.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from .checkpoint_io import CheckpointError

WRAPPERS = ("state_dict", "model", "ema")
DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class Row(NamedTuple):
    """One original tensor and what it is made of."""

    original: str
    ours: tuple[str, ...]
    part: str = "body"  # or "dead", "local bias", "global bias", "branch"
    pointwise: bool = False  # the original keeps a (out, in, 1, 1) convolution where ours is a linear layer

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Our tensors, as views of the original one."""
        tensor = tensor.flatten(1) if self.pointwise else tensor
        return dict(zip(self.ours, tensor.contiguous().chunk(len(self.ours))))

    def join(self, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The original tensor."""
        tensors = [state_dict[name] for name in self.ours]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return tensor[:, :, None, None] if self.pointwise else tensor


def _linear(original: str, *ours: str, part: str = "body") -> list[Row]:
    """The two rows of a linear layer (or convolution) with bias."""
    ours = ours or (original,)
    return [Row(f"{original}.{end}", tuple(f"{name}.{end}" for name in ours), part) for end in ("weight", "bias")]


def _query_stage(stage: int) -> list[Row]:
    original, ours = f"attn1.processor.query_feat_extract.{stage}.conv", f"attn.global_context.query_stages.{stage}"
    return [
        Row(f"{original}.0.weight", (f"{ours}.depthwise.weight",), "branch"),
        Row(f"{original}.2.fc.0.weight", (f"{ours}.squeeze.weight",), "branch"),
        Row(f"{original}.2.fc.2.weight", (f"{ours}.excite.weight",), "branch"),
        Row(f"{original}.3.weight", (f"{ours}.pointwise.weight",), "branch", pointwise=True),
    ]


BLOCK_ROWS = (
    Row("scale_shift_table", ("scale_shift_table",)),
    *_linear("attn1.to_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    *_linear("attn1.to_q", "attn.to_q", part="dead"),
    *_linear("attn1.to_k", "attn.to_k", part="dead"),
    *_linear("attn1.to_v", "attn.to_v", part="dead"),
    *_linear("attn1.to_out.0", "attn.to_out.0"),
    Row("attn1.norm_q.weight", ("attn.norm_q.weight",)),
    Row("attn1.norm_k.weight", ("attn.norm_k.weight",)),
    Row("attn1.processor.local_rel_pos_bias", ("attn.rel_pos_bias",), "local bias"),
    Row("attn1.processor.global_rel_pos_bias", ("attn.global_context.rel_pos_bias",), "global bias"),
    *_linear("attn1.processor.to_global_kv", "attn.global_context.to_k", "attn.global_context.to_v", part="branch"),
    *_query_stage(0),
    *_query_stage(1),
    *_linear("attn2.to_q", "cross_attn.to_q"),
    *_linear("attn2.to_k", "cross_attn.to_k"),
    *_linear("attn2.to_v", "cross_attn.to_v"),
    *_linear("attn2.to_kv", "cross_attn.to_k", "cross_attn.to_v", part="dead"),
    *_linear("attn2.to_out.0", "cross_attn.to_out.0"),
    Row("attn2.norm_q.weight", ("cross_attn.norm_q.weight",)),
    Row("attn2.norm_k.weight", ("cross_attn.norm_k.weight",)),
    *_linear("ff.net.0.proj"),
    *_linear("ff.net.2"),
)

OUTER_ROWS = (
    Row("scale_shift_table", ("scale_shift_table",)),
    *_linear("pos_embed.proj"),
    *(
        row
        for embedder in ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder")
        for layer in (1, 2)
        for row in _linear(f"adaln_single.emb.{embedder}.linear_{layer}")
    ),
    *_linear("adaln_single.linear"),
    *_linear("caption_projection.linear_1"),
    *_linear("caption_projection.linear_2"),
    *_linear("proj_out"),
)


def key_table(num_layers: int) -> list[Row]:
    """The whole table for a model of `num_layers` blocks."""
    blocks = (
        row._replace(original=f"{prefix}.{row.original}", ours=tuple(f"{prefix}.{name}" for name in row.ours))
        for prefix in (f"transformer_blocks.{layer}" for layer in range(num_layers))
        for row in BLOCK_ROWS
    )
    return [*OUTER_ROWS, *blocks]


def some(names: Iterable[str]) -> str:
    """Up to three names of many, for messages."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def count_layers(names: Iterable[str]) -> int:
    """How many blocks these keys (of either layout) belong to; the blocks must be numbered without a gap."""
    layers = {
        int(match[1]) for match in (re.match(r"transformer_blocks\.(\d{1,6})\.", name) for name in names) if match
    }
    missing = set(range(len(layers))) - layers
    if not layers or missing:
        raise CheckpointError(
            f"the file has {len(layers)} transformer_blocks" + (f" but not number {min(missing)}" if missing else "")
        )
    return len(layers)


def unwrap(checkpoint: Any) -> tuple[dict[str, torch.Tensor], str]:
    """
    Take the tensors out of what a training framework put around them.

    Args:
        checkpoint (`Any`):
            What a file holds: a dictionary of tensors, possibly below `state_dict`, `model` or `ema` (nested too; the
            first of them that is there counts, other entries beside it are ignored), with names that may carry
            `module.` and `_orig_mod.`.

    Returns:
        `tuple[dict[str, torch.Tensor], str]`: The tensors by original name, and in words where they were found.

    Raises:
        `CheckpointError`: No dictionary of dense, floating-point tensors is there.
    """
    path, seen = [], set()
    while isinstance(checkpoint, Mapping) and id(checkpoint) not in seen:
        seen.add(id(checkpoint))
        wrapper = next((name for name in WRAPPERS if isinstance(checkpoint.get(name), Mapping)), None)
        if wrapper is None:
            break
        beside = [name for name in WRAPPERS if name != wrapper and name in checkpoint]
        path.append(f"{wrapper!r}" + (f" (not {some(map(repr, beside))})" if beside else ""))
        checkpoint = checkpoint[wrapper]
    else:
        raise CheckpointError(f"expected a dictionary of tensors, found {type(checkpoint).__name__}")
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in checkpoint.items():
        name = re.sub(r"(?:^|(?<=\.))(?:module|_orig_mod)\.", "", str(key))
        if name in tensors:
            raise CheckpointError(f"{name} is in the file twice, with and without a prefix")
        _require_dense(name, tensor)
        tensors[name] = tensor
    if not tensors:
        raise CheckpointError("the file holds no tensors")
    prefixed = " after removing prefixes" if tensors.keys() != checkpoint.keys() else ""
    return tensors, (" in ".join(reversed(path)) or "the file itself") + prefixed


def _require_dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{name} is {type(tensor).__name__}; expected a tensor, like everything in its dictionary"
        )
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{name} is {tensor.layout} {tensor.dtype} on {tensor.device}; expected a dense tensor of "
            f"{', '.join(DTYPES.values())} (a quantised file has to be restored first)"
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} claims {tensor.numel():,} numbers but the file holds fewer for it")
