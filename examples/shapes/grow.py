"""
Puts further blocks at the end of a trained transformer, for a run that goes on from it with more parameters.

A new block is a copy of the last trained one that shifts its windows alike, with outputs of zero (block expansion, Wu
et al. 2024, https://arxiv.org/abs/2401.02415). What it still adds is its own gated input, which LocalDiT's attention
hands through, so that the loss is higher at first.
"""

import argparse
from pathlib import Path

from torch import nn

from diffusers_localdit import BUNDLED_MODEL, LocalDiTTransformer2DModel
from diffusers_localdit.checkpoint_io import written_whole
from diffusers_localdit.training.models import read_transformer


def grow(trained: LocalDiTTransformer2DModel, blocks: int) -> LocalDiTTransformer2DModel:
    """
    The trained transformer with so many new `blocks` behind its own, of which the products add nothing yet.

    Raises:
        `ValueError`: It has fewer blocks than there are window shifts.
    """
    depth, shifts = trained.config.num_layers, trained.config.window_size
    if depth < shifts:
        raise ValueError(
            f"a new block copies the one {shifts} before it, and this transformer has only {depth} blocks"
        )
    grown = LocalDiTTransformer2DModel.from_config({**trained.config, "num_layers": depth + blocks})
    grown.load_state_dict(trained.state_dict(), strict=False)
    for index in range(depth, depth + blocks):
        block = grown.transformer_blocks[index]
        block.load_state_dict(grown.transformer_blocks[index - shifts].state_dict())
        for output in (block.attn.to_out[0], block.cross_attn.to_out[0], block.ff.net[2]):
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)
    return grown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--transformer", default=str(BUNDLED_MODEL), help="run, checkpoint, pipeline or transformer")
    parser.add_argument("--blocks", type=int, default=3, help="how many new ones")
    parser.add_argument("--output", type=Path, default=Path("out/shapes/grown"), help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    try:
        with written_whole(args.output, args.overwrite) as folder:
            grown = grow(read_transformer(args.transformer), args.blocks)
            grown.save_pretrained(folder)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.output}: {grown.config.num_layers} blocks, {grown.num_parameters() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
