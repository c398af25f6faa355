"""How much memory a pass takes where it is not a CPU's: bytes of tensors, counted on the meta device."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from transformer_inputs import map_tensors

from diffusers_localdit import LocalDiTTransformer2DModel
from diffusers_localdit.kernels import processor
from diffusers_localdit.kernels.processor import LocalDiTTritonAttnProcessor


def peak_bytes(model: torch.nn.Module, inputs: dict) -> int:
    """Most bytes of tensors at a time that a pass makes."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    living, peak = {}, 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            output = func(*args, **(kwargs or {}))
            for key in [key for key, (storage, _) in living.items() if storage.expired()]:
                del living[key]
            known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for tensor in tree_leaves(output):
                storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
                if storage is not None and storage._cdata not in weights | known:
                    living.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
            peak = max(peak, sum(size for _, size in living.values()))
            return output

    model(**inputs)  # what is computed once is not of a pass
    with Count():
        model(**inputs)
    return peak


@torch.no_grad()
@pytest.mark.parametrize(
    "use_global_context, kernels, most", [(True, True, 0.6), (False, True, 0.45), (True, False, 0.7)]
)
def test_a_large_picture_takes_less_memory_than_with_pixart(use_global_context, kernels, most, monkeypatch):
    """
    Tensors of a pass over a batch of two of 2048 x 2048 pixels at full width. A device without numbers also shows that
    no step has to wait for any.
    """
    monkeypatch.setattr(processor, "why_not_call", lambda *args: None)
    # Neither has scores in memory.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, *args, **_: query.clone())
    inputs = {
        "hidden_states": torch.empty(2, 4, 256, 256),
        "encoder_hidden_states": torch.empty(2, 120, 4096),
        "timestep": torch.empty(2),
        "added_cond_kwargs": {"resolution": torch.empty(2, 2), "aspect_ratio": torch.empty(2, 1)},
    }
    inputs = map_tensors(lambda x: x.to("meta", torch.bfloat16), inputs)
    with torch.device("meta"):
        pixart = PixArtTransformer2DModel(num_layers=2, caption_channels=4096).bfloat16()
        model = LocalDiTTransformer2DModel(num_layers=2, use_global_context=use_global_context).bfloat16()
    if kernels:
        model.set_attn_processor(LocalDiTTritonAttnProcessor())
    ours, theirs = (peak_bytes(module, inputs) for module in (model, pixart))
    assert ours <= most * theirs
