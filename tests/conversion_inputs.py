"""Small checkpoints in the original's layout, and what may be in them."""

import copy
import functools
from pathlib import Path

import torch

from diffusers_localdit import LocalDiTTransformer2DModel
from diffusers_localdit.state_dict_conversion import original_state_dict

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_ORIGINALS = sorted(GOLDEN.glob("*/original_*"))


@functools.cache
def _tiny_original() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = LocalDiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=4, num_layers=2, caption_channels=8, window_size=2
    )
    original = original_state_dict(model.state_dict())
    return {name: torch.randn_like(tensor) for name, tensor in original.items()}


def tiny_original(*parts: str) -> dict[str, torch.Tensor]:
    """
    A checkpoint with 2 layers, 3 heads of 4, window 2; of what the processor owns only `parts`: "local", "branch".
    """
    return copy.deepcopy({name: tensor for name, tensor in _tiny_original().items() if _part(name) in (None, *parts)})


def _part(name: str) -> str | None:
    if "processor" not in name:
        return None
    return "local" if "local_rel_pos_bias" in name else "branch"


def is_dead(name: str) -> bool:
    return any(part in name for part in ("attn1.to_q.", "attn1.to_k.", "attn1.to_v.", "attn2.to_kv."))
