"""Puts the trained parts together as a diffusers pipeline folder in float16: what the package ships.

Before there is a transformer the pipeline is made without one: for `localdit precompute`.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from transformers import T5EncoderModel, T5Tokenizer

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline
from diffusers_localdit.training.models import read_transformer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/shapes"), help="where the training scripts wrote")
    parser.add_argument("--output", type=Path, default=BUNDLED_MODEL, help="replaced if it exists")
    parser.add_argument("--transformer", type=Path, help="a run of `localdit train`, or weights; else those in FOLDER")
    args = parser.parse_args()

    transformer = args.transformer or args.folder / "transformer"
    complete = args.transformer is not None or transformer.exists()
    if not complete and args.output == BUNDLED_MODEL:
        parser.error(f"there is no {transformer}; give --output for a pipeline without one")
    pipeline = LocalDiTPipeline(
        tokenizer=T5Tokenizer.from_pretrained(args.folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(args.folder / "text_encoder"),
        vae=AutoencoderKL.from_pretrained(args.folder / "vae"),
        transformer=read_transformer(str(transformer)) if complete else None,
        # The released LocalDiT's sampler, but with noise in every step: docs/TRAIN.md has how much more is right then.
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", algorithm_type="sde-dpmsolver++"
        ),
    )
    pipeline.to(torch.float16)
    for model in (pipeline.vae, pipeline.transformer):
        if model is not None:
            model.register_to_config(_name_or_path="localdit-shapes")  # else the folder it was trained in
    temporary = args.output.with_name(args.output.name + ".tmp")
    pipeline.save_pretrained(temporary)
    if args.output.exists():
        if (args.output / "images").exists():  # the examples: draw them again with `localdit generate --like`
            (args.output / "images").rename(temporary / "images")
        shutil.rmtree(args.output)
    temporary.rename(args.output)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
