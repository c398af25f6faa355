"""Judges from its pixels alone whether a picture shows what a caption asks for.

The objects are the connected regions that differ from the background. A region's colour is the nearest palette colour,
its shape follows from how it fills its bounding box, its size from the bounding box.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, RADII, RELATIONS, Spec

FOREGROUND = 64  # RGB distance from the background, just under half that of the least distinct colour (138)
SPECK = 40  # pixels of a 128 x 128 picture; smaller regions are ignored, the smallest object has 288
SIZE_BOUNDS = tuple((RADII[a][1] + RADII[b][0]) / 2 for a, b in (("small", "medium"), ("medium", "large")))


@dataclass(frozen=True)
class Found:
    """An object found in a picture: `shape` is None if it is none of the three; centre and radius in pixels."""

    colour: str
    shape: str | None
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Verdict:
    """`right` as to background, objects and relation, else the `reason`; `sizes_right` only if all else is."""

    right: bool
    sizes_right: bool
    reason: str = ""


def nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: np.linalg.norm(colour - np.array(palette[name])))


def number_runs(mask: np.ndarray) -> np.ndarray:
    """Numbers the runs of True along the rows of a mask (height, width) from 1; 0 where it is False."""
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    return np.where(mask, np.cumsum(starts).reshape(mask.shape), 0)


def label_regions(mask: np.ndarray) -> np.ndarray:
    """Numbers the 4-connected regions of a mask (height, width): 0 outside, else one number per region."""
    rows, columns = number_runs(mask), number_runs(mask.T).T
    labels = rows
    while True:
        spread = labels
        for runs in (columns, rows):  # the highest number of every run spreads over the whole run
            highest = np.zeros(runs.max() + 1, dtype=labels.dtype)
            np.maximum.at(highest, runs, spread)
            spread = highest[runs]
        if (spread == labels).all():
            return labels
        labels = spread


def classify_shape(mask: np.ndarray) -> str | None:
    """Names the shape of a region from its bounding box, `mask` (height, width).

    A triangle has three times as much in its lower half as in its upper one, also when its corners are soft; circles
    and squares have the same in both, and fill pi / 4 and all of the box.
    """
    height, width = mask.shape
    fill = mask.mean()
    balance = mask[height // 2 :].sum() / max(mask[: height // 2].sum(), 1)
    if not 0.75 < width / height < 1.33:
        return None
    if balance > 1.6:
        return "triangle" if 0.4 < fill < 0.7 else None
    if not 0.7 < balance < 1.4 or fill < 0.7:
        return None
    return "square" if fill > 0.89 else "circle"


def find_background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The name of the background, read at the edge of the picture (height, width, 3), and the colour it has there."""
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), *pixels[:, [0, 1, -2, -1]]])
    colour = np.median(edge, axis=0)
    return nearest(colour, BACKGROUNDS), colour


def find_objects(pixels: np.ndarray) -> list[Found]:
    """Finds the objects of a picture (height, width, 3) with values 0..255."""
    scale = len(pixels) / IMAGE_SIZE
    _, background = find_background(pixels)
    regions = label_regions(np.linalg.norm(pixels - background, axis=-1) > FOREGROUND)
    found = []
    for label in np.unique(regions[regions > 0]):
        region = regions == label
        if region.sum() < SPECK * scale**2:
            continue
        colour = np.median(pixels[region], axis=0)
        # Soft edges belong to the object where it covers at least half of the pixel.
        contrast = colour - background
        solid = region & ((pixels - background) @ contrast > 0.5 * contrast @ contrast)
        rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        radius = (bottom - top + right - left) / 4 / scale
        size = tuple(RADII)[int(np.searchsorted(SIZE_BOUNDS, radius))]
        x, y = (left + right) / 2 / scale, (top + bottom) / 2 / scale
        shape = classify_shape(solid[top:bottom, left:right])
        found.append(Found(nearest(colour, COLOURS), shape, size, float(x), float(y), float(radius)))
    return found


def judge(image: Image.Image, spec: Spec) -> Verdict:
    """Compares a picture with what its caption asks for."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    background, _ = find_background(pixels)
    if background != spec.background:
        return Verdict(False, False, f"background is {background}")
    found = find_objects(pixels)
    wanted = spec.items * spec.count
    if Counter((f.colour, f.shape) for f in found) != Counter((item.colour, item.shape) for item in wanted):
        shown = ", ".join(f"{f.colour} {f.shape or 'thing'}" for f in found) or "nothing"
        return Verdict(False, False, f"shows {shown}")
    if spec.relation:
        first, second = (
            next(f for f in found if (f.colour, f.shape) == (item.colour, item.shape)) for item in spec.items
        )
        away = np.array([second.x - first.x, second.y - first.y])
        direction = np.array(RELATIONS[spec.relation])
        if away @ direction <= np.abs(away @ direction[::-1]):
            return Verdict(False, False, f"not {spec.relation}")
    if spec.kind == "count":  # counted objects have a size of their own
        return Verdict(True, True)
    sizes = Counter((f.colour, f.shape, f.size) for f in found)
    return Verdict(True, sizes == Counter((item.colour, item.shape, item.size) for item in wanted))
