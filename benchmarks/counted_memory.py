"""
Bytes of tensors that a forward pass has at most at a time on a GPU, on top of weights and inputs: LocalDiT against
diffusers' PixArt transformer, full width, bfloat16, not compiled. Counted without a GPU: every operation is run on the
meta device, where tensors have shapes and lifetimes but no numbers. What operations use inside and what an allocator
rounds up is not in it; norms are counted as several operations, where a GPU has one.
The last line is JSON.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from unittest.mock import patch

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer import make_inputs

from diffusers_localdit import LocalDiTTransformer2DModel, transformer_localdit
from diffusers_localdit.kernels import processor

META = torch.device("meta")
LAYERS = 2  # of which the second finds what the first one leaves


class PeakOfTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is active and still live; `peak` is the most so far."""

    def __init__(self):
        super().__init__()
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        self.living = {key: entry for key, entry in self.living.items() if not entry[0].expired()}
        for storage in storages(result):
            if storage._cdata not in given:  # neither a view nor written in place
                self.living.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.living.values()))
        return result


def storages(tree: object) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def make_model(name: str) -> nn.Module:
    with META:
        if name == "pixart":
            model = PixArtTransformer2DModel(num_layers=LAYERS, sample_size=128, caption_channels=4096)
        else:
            model = LocalDiTTransformer2DModel(num_layers=LAYERS, use_global_context=name.endswith("global"))
    if name.startswith("triton"):
        model.set_attn_processor(processor.LocalDiTTritonAttnProcessor())
    return model.bfloat16().eval()


@torch.no_grad()
def count(name: str, side: int, batch_size: int) -> int:
    model, inputs = make_model(name), make_inputs(side, side, batch_size, META, torch.bfloat16)
    with ExitStack() as stack:
        # As on a GPU: no attention keeps scores in memory, kernels serve, and products apply the GELU.
        attention = patch.object(
            torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: query.clone()
        )
        stack.enter_context(attention)
        stack.enter_context(patch.object(processor, "why_not_call", lambda *args: None))
        stack.enter_context(patch.object(transformer_localdit, "may_fuse_gelu", lambda *args: True))
        model(**inputs)  # what is computed once for a size is no part of a pass
        counter = stack.enter_context(PeakOfTensors())
        model(**inputs)
    return counter.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="sides of the pictures in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()

    rows = []
    print("| size, batch | model | peak MiB | of PixArt's |\n|---|---|---|---|")
    for side in args.sizes:
        for batch_size in args.batches:
            pixart = count("pixart", side, batch_size)
            for name in ("pixart", "localdit-global", "localdit-folded", "triton-global", "triton-folded"):
                peak = count(name, side, batch_size)
                rows.append({"model": name, "size": side, "batch_size": batch_size, "peak_bytes": peak})
                rows[-1]["share"] = peak / pixart
                print(
                    f"| {side} x {side}, {batch_size} | {name} | {peak / 2**20:.0f} | {peak / pixart:.2f} |",
                    flush=True,
                )
    print(json.dumps({"torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
