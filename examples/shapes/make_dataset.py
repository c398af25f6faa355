"""Renders pictures with their captions into tar shards, for `localdit precompute` and the trainer.

Run it again to resume. A picture depends on the seed and its number only, so that more pictures are the same and more.
"""

import argparse
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from scenes import COLOURS, Scene, leave_out, render, sample_scene
from tqdm import tqdm

from diffusers_localdit.training.shards import SHARD_NAME, write_shard


def in_one_colour(scene: Scene, colour: str) -> Scene:
    """The scene with all objects in this colour, whatever its caption says."""
    objects = tuple(replace(placed, item=replace(placed.item, colour=colour)) for placed in scene.objects)
    return replace(scene, objects=objects)


def make_sample(
    seed: int, number: int, held_out: bool = False, colour: str | None = None, faint: float = 0.0
) -> tuple[str, dict[str, bytes]]:
    """Key of a picture and its members by extension."""
    rng = np.random.default_rng([seed, number])
    scene = sample_scene(rng, held_out=held_out, faint=faint > 0 and rng.random() < faint)
    picture = io.BytesIO()
    render(scene if colour is None else in_one_colour(scene, colour)).save(picture, "PNG")
    caption = scene.caption if held_out or colour else leave_out(scene.caption, rng)
    return f"{number:08d}", {"png": picture.getvalue(), "txt": caption.encode()}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/shapes/pictures"), help="folder of the shards")
    parser.add_argument("--pictures", type=int, default=40000)
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--held-out", action="store_true", help="of the captions that training never sees")
    parser.add_argument("--colour", choices=COLOURS, help="of all objects, whatever captions say: a style for LoRA")
    parser.add_argument("--faint", type=float, default=0.0, help="share that must show one of the objects in FAINT")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    args.output.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(tqdm(range(0, args.pictures, args.samples_per_shard), unit=" shards")):
        path = args.output / SHARD_NAME.format(shard)
        if not path.exists():
            numbers = range(start, min(start + args.samples_per_shard, args.pictures))
            settings = (args.held_out, args.colour, args.faint)
            write_shard(path, (make_sample(args.seed, number, *settings) for number in numbers))


if __name__ == "__main__":
    main()
