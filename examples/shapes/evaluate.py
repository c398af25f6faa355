"""Generates pictures for captions that training never saw and prints how many are right, per kind, as a table.

There are few held-out captions of one object or of counted ones, so these come up several times, with other noise.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from judge import Verdict, judge
from PIL import Image, ImageDraw
from scenes import IMAGE_SIZE, KINDS, sample_caption
from tqdm import tqdm

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline


def draw_sheet(drawn: list[tuple[Image.Image, str, Verdict]], columns: int) -> Image.Image:
    """Pictures in rows with their captions below; wrong ones are framed in red and say what is wrong."""
    width, height, pad = IMAGE_SIZE + 22, IMAGE_SIZE + 72, 11
    sheet = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * height), "whitesmoke")
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption, verdict) in enumerate(drawn):
        x, y = index % columns * width + pad, index // columns * height + pad
        frame = (x - 3, y - 3, x + IMAGE_SIZE + 2, y + IMAGE_SIZE + 2)
        draw.rectangle(frame, outline="lightgrey" if verdict.right else "red", width=3)
        sheet.paste(image, (x, y))
        draw_wrapped(draw, (x, y + IMAGE_SIZE + 5), caption, "black")
        if not verdict.right:
            draw_wrapped(draw, (x, y + IMAGE_SIZE + 38), verdict.reason, "red")
    return sheet


def draw_wrapped(draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str, fill: str) -> None:
    """Writes `text` in lines as wide as a picture, at most three of them."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= IMAGE_SIZE:
            lines[-1] = longer
        else:
            lines.append(word)
    draw.multiline_text(position, "\n".join(lines[:3]), fill=fill, spacing=0)


def judged_pictures(
    pipeline: LocalDiTPipeline, pictures: int, steps: int, guidance_scale: float, batch_size: int, seed: int
) -> Iterator[tuple[str, Image.Image, str, Verdict]]:
    """Kind, picture, caption and verdict for held-out captions, so many `pictures` of each kind."""
    pipeline.set_progress_bar_config(disable=True)
    progress = tqdm(total=pictures * len(KINDS), mininterval=5)
    for kind_index, kind in enumerate(KINDS):
        rng = np.random.default_rng((seed, kind_index))
        wanted = [sample_caption(rng, kind, held_out=True) for _ in range(pictures)]
        for start in range(0, pictures, batch_size):
            batch = wanted[start : start + batch_size]
            first_seed = seed + kind_index * pictures + start
            images = pipeline(
                prompt=[caption for _, caption in batch],
                generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(batch))],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
            ).images
            for image, (spec, caption) in zip(images, batch):
                yield kind, image, caption, judge(image, spec)
            progress.update(len(batch))
    progress.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL, help="pipeline folder")
    parser.add_argument("--pictures", type=int, default=256, help="pictures per kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--algorithm", choices=("dpmsolver++", "sde-dpmsolver++"), help="in place of the scheduler's")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="PNG file for the first pictures of every kind")
    parser.add_argument("--sheet-columns", type=int, default=8, help="pictures per row; two rows for every kind")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = LocalDiTPipeline.from_pretrained(args.model).to(device)
    if args.algorithm:
        config = pipeline.scheduler.config
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, algorithm_type=args.algorithm)
    verdicts, shown = {kind: [] for kind in KINDS}, []
    drawn = judged_pictures(pipeline, args.pictures, args.steps, args.guidance_scale, args.batch_size, args.seed)
    for kind, image, caption, verdict in drawn:
        verdicts[kind].append(verdict)
        if len(verdicts[kind]) <= 2 * args.sheet_columns:
            shown.append((image, caption, verdict))

    print("| kind | pictures | right | sizes right too |\n|---|---|---|---|")
    overall = [verdict for group in verdicts.values() for verdict in group]
    for name, group in [*verdicts.items(), ("overall", overall)]:
        right, sizes = (100 * np.mean([getattr(v, which) for v in group]) for which in ("right", "sizes_right"))
        print(f"| {name} | {len(group)} | {right:.1f}% | {sizes:.1f}% |")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(shown, args.sheet_columns).save(args.sheet)


if __name__ == "__main__":
    main()
