"""Draws pictures of a dozen prompts, and pictures after three crude sketches, on one sheet: what `make demo` shows."""

import argparse
import math
import random
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_localdit import BUNDLED_MODEL, LocalDiTImg2ImgPipeline, LocalDiTPipeline

# Captions that the bundled model was never trained on.
PROMPTS = [
    "a purple circle on a black background",
    "a large yellow square on a grey background",
    "an orange triangle on a white background",
    "a red circle and a blue circle on a grey background",
    "a large red square and a small yellow triangle on a white background",
    "a small green circle and a large yellow triangle on a black background",
    "a yellow triangle right of a green square on a grey background",
    "a yellow circle below a small blue square on a white background",
    "a large blue circle left of a large green square on a black background",
    "three green triangles on a grey background",
    "three orange squares on a white background",
    "four red squares on a black background",
]
# The sketch of each prompt: the colour of the paper, and shape, colour, centre and radius of its scribbles.
SKETCHES = {
    "a red circle above a large green circle on a white background": (
        "white",
        [("circle", "firebrick", (58, 27), 18), ("circle", "seagreen", (66, 88), 28)],
    ),
    "a purple square left of a large orange triangle on a grey background": (
        "darkgrey",
        [("square", "darkorchid", (30, 68), 18), ("triangle", "darkorange", (88, 62), 27)],
    ),
    "two red circles on a black background": (
        "black",
        [("circle", "firebrick", (36, 40), 16), ("circle", "firebrick", (90, 84), 16)],
    ),
}
STRENGTH = 0.6
GUIDANCE_SCALE = 1.5  # more of it bends the shapes of the bundled model

COLUMNS = 6
CELL = 128
GAP = 14
CAPTION_HEIGHT = 78
CAPTION_LETTERS = 22  # a line
PAPER, INK, EDGE = (250, 250, 248), (40, 40, 40), (200, 200, 200)

# Half the width of a shape of radius 1 at the height y, from -1 at the top to 1.
HALF_WIDTH = {
    "circle": lambda y: math.sqrt(1 - y**2),
    "square": lambda y: 1.0,
    "triangle": lambda y: (1 + y) / 2,
}


def draw_sketch(paper: str, scribbles: list[tuple], size: int = 128) -> Image.Image:
    """What a quick hand with a thick pen makes of a few shapes."""
    rng = random.Random(0)
    image = Image.new("RGB", (size, size), paper)
    draw = ImageDraw.Draw(image)
    for shape, colour, (x, y), radius in scribbles:
        heights = [-1 + i / 4 for i in range(9)]
        zigzag = [
            (x + side * radius * HALF_WIDTH[shape](height) * rng.uniform(0.75, 1.1), y + radius * height)
            for height, side in zip(heights, [-1, 1] * 5)
        ]
        draw.line(zigzag, fill=colour, width=7, joint="curve")
    return image


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def make_cells(model: str | Path) -> tuple[list, list]:
    """Pictures with captions: those of `PROMPTS`, then each sketch and what becomes of it."""
    text_to_image = LocalDiTPipeline.from_pretrained(model)
    images = text_to_image(PROMPTS, guidance_scale=GUIDANCE_SCALE, generator=generators(len(PROMPTS))).images

    image_to_image = LocalDiTImg2ImgPipeline.from_pipe(text_to_image)
    sketches = [draw_sketch(*sketch) for sketch in SKETCHES.values()]
    results = image_to_image(
        list(SKETCHES),
        image=sketches,
        strength=STRENGTH,
        guidance_scale=GUIDANCE_SCALE,
        generator=generators(len(sketches)),
    ).images
    redrawn = []
    for sketch, result, prompt in zip(sketches, results, SKETCHES):
        redrawn += [(sketch, "a sketch"), (result, prompt)]
    return list(zip(images, PROMPTS)), redrawn


def draw_sheet(sections: dict[str, list[tuple[Image.Image, str]]]) -> Image.Image:
    """Rows of pictures with their captions, under the title of their section."""
    title_font, font = ImageFont.load_default(18), ImageFont.load_default(11)
    title_height = 18 + 2 * GAP
    row_height = CELL + CAPTION_HEIGHT
    rows = sum(math.ceil(len(cells) / COLUMNS) for cells in sections.values())
    size = (GAP + COLUMNS * (CELL + GAP), len(sections) * title_height + rows * row_height)

    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for title, cells in sections.items():
        draw.text((GAP, top + GAP), title, fill=INK, font=title_font)
        top += title_height
        for i, (image, caption) in enumerate(cells):
            x, y = GAP + i % COLUMNS * (CELL + GAP), top + i // COLUMNS * row_height
            draw.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline=EDGE)
            sheet.paste(image.resize((CELL, CELL)), (x, y))
            draw.text((x, y + CELL + 4), textwrap.fill(caption, CAPTION_LETTERS), fill=INK, font=font)
        top += math.ceil(len(cells) / COLUMNS) * row_height
    return sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/contact_sheet.png"), help="default: %(default)s")
    parser.add_argument("--model", default=BUNDLED_MODEL, help="folder or repository id (default: the bundled model)")
    args = parser.parse_args(argv)

    made, redrawn = make_cells(args.model)
    sheet = draw_sheet({"Text to image": made, f"Image to image, strength {STRENGTH}": redrawn})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(f"The contact sheet is in {args.output}")


if __name__ == "__main__":
    main()
