"""Pictures of coloured shapes and the captions that describe them, and captions back into what they ask for.

A caption asks for one of four kinds of picture:

- `single`: "a large red circle on a white background"
- `two`: "a red circle and a blue square on a grey background"
- `relation`: "a large red circle left of a small blue square on a white background"
- `count`: "three green triangles on a black background"

Pictures are 128 pixels square in the recipe. Objects lie wholly inside and keep a clear gap.
"""

import re
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 128
GAP = 8  # pixels kept free between the bounding boxes of two objects
MARGIN = 4  # pixels kept free at the edge of the picture

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (215, 30, 30),
    "green": (40, 160, 60),
    "blue": (30, 70, 230),
    "yellow": (255, 230, 50),
    "purple": (160, 40, 190),
    "orange": (255, 135, 0),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (176, 176, 176), "black": (0, 0, 0)}
RADII = {"small": (12, 14), "medium": (18, 20), "large": (25, 28)}  # pixels
COUNTED_RADII = (13, 16)
COUNTS = ("one", "two", "three", "four")
# The direction from the first object to the second: (x, y), with y pointing down as in pictures.
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Colours that hardly differ from a background. As latents of the bundled VAE, small shapes in them are 3.2 to 4.4 away
# from the empty picture, all others 5.8 to 30.1. The noise of the sampler hides these longest, and a model that has
# few of them to learn from leaves them out.
FAINT = {("yellow", "white"), ("blue", "black")}
KINDS = {"single": 0.20, "two": 0.27, "relation": 0.26, "count": 0.27}  # shares of the training pictures


@dataclass(frozen=True)
class Item:
    """One object as a caption names it; `medium` is the size that captions leave unsaid."""

    colour: str
    shape: str
    size: str = "medium"

    def phrase(self) -> str:
        words = [self.colour, self.shape] if self.size == "medium" else [self.size, self.colour, self.shape]
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words])


@dataclass(frozen=True)
class Spec:
    """What a caption asks for. Counted objects are one item with `count` from 2 to 4."""

    kind: str
    background: str
    items: tuple[Item, ...]
    relation: str | None = None
    count: int = 1

    def is_faint(self) -> bool:
        """Whether an object, small or counted, hardly differs from the background."""
        small = [item for item in self.items if item.size == "small" or self.kind == "count"]
        return any((item.colour, self.background) in FAINT for item in small)

    def canonical(self) -> "Spec":
        """The same content in one order: "A right of B" is "B left of A", "A and B" is "B and A"."""
        if self.kind == "two":
            items = tuple(sorted(self.items, key=Item.phrase))
            return Spec(self.kind, self.background, items)
        if self.relation in ("right of", "below"):
            return Spec(self.kind, self.background, self.items[::-1], OPPOSITE[self.relation])
        return self


@dataclass(frozen=True)
class Placed:
    """An object in the picture: its centre and the half side of its bounding box, in pixels."""

    item: Item
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    spec: Spec
    objects: tuple[Placed, ...]
    caption: str


# Captions


def write_caption(spec: Spec, rng: np.random.Generator | None = None) -> str:
    """Writes the caption of `spec`; with `rng`, now and then in the second wording that `parse_caption` knows."""
    varied = rng is not None and rng.random() < 0.25
    if spec.kind == "count":
        objects = f"{COUNTS[spec.count - 1]} {spec.items[0].colour} {spec.items[0].shape}s"
    elif spec.kind == "relation":
        relation = f"to the {spec.relation}" if varied and spec.relation.endswith("of") else spec.relation
        objects = f"{spec.items[0].phrase()} {relation} {spec.items[1].phrase()}"
    else:
        objects = " and ".join(item.phrase() for item in spec.items)
    return f"{objects} on {spec.background}" if varied else f"{objects} on a {spec.background} background"


_ITEM = rf"an? (?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_SPLIT_BACKGROUND = re.compile(rf"(.+) on (?:a )?({'|'.join(BACKGROUNDS)})(?: background)?")
_COUNTED = re.compile(rf"({'|'.join(COUNTS[1:])}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s")
_ONE_OR_TWO = re.compile(rf"{_ITEM}(?: (and|(?:to the )?(?:left|right) of|above|below) {_ITEM})?")


def parse_caption(caption: str) -> Spec:
    """Reads a caption back.

    Raises:
        ValueError: If the caption is not of the four kinds.
    """
    split = _SPLIT_BACKGROUND.fullmatch(caption)
    objects, background = split.groups() if split else (caption, "")
    if split and (match := _COUNTED.fullmatch(objects)):
        count, colour, shape = match.groups()
        return Spec("count", background, (Item(colour, shape),), count=COUNTS.index(count) + 1)
    if split and (match := _ONE_OR_TWO.fullmatch(objects)):
        size, colour, shape, joint, *second = match.groups()
        first = Item(colour, shape, size or "medium")
        if joint is None:
            return Spec("single", background, (first,))
        items = (first, Item(second[1], second[2], second[0] or "medium"))
        if joint == "and":
            return Spec("two", background, items)
        return Spec("relation", background, items, joint.removeprefix("to the "))
    raise ValueError(
        f"cannot read the caption {caption!r}; expected one like 'a red circle on a white background', "
        "'a red circle and a blue square on a grey background', 'a large red circle left of a small blue square "
        "on a white background' or 'three green triangles on a black background'"
    )


_BACKGROUND = re.compile(rf" on (?:a )?(?:{'|'.join(BACKGROUNDS)})(?: background)?$")
_COLOUR = re.compile(rf"\b(?:{'|'.join(COLOURS)}) ")
LEFT_OUT = 0.1  # share of the training captions without background, and of those without colours


def leave_out(caption: str, rng: np.random.Generator) -> str:
    """
    One caption in five without their background or without their colours, the others as they are.

    There are only 149 captions of single objects to train on. Seen whole only, they are learned one by one, and those
    that are held out get the picture of a neighbour; with parts left out, the parts have meanings of their own.
    """
    draw = rng.random()
    if draw < LEFT_OUT:
        return _BACKGROUND.sub("", caption)
    if draw < 2 * LEFT_OUT:
        return re.sub(r"\ban (?![aeiou])", "a ", _COLOUR.sub("", caption))
    return caption


def is_held_out(caption: str) -> bool:
    """Whether the caption belongs to the tenth that training never sees, by content and not by wording."""
    return zlib.crc32(write_caption(parse_caption(caption).canonical()).encode()) % 10 == 0


# Scenes


def _choice(rng: np.random.Generator, options, p=None):
    return tuple(options)[rng.choice(len(options), p=p)]


def _sample_item(rng: np.random.Generator) -> Item:
    return Item(_choice(rng, COLOURS), _choice(rng, SHAPES), _choice(rng, RADII, p=(0.2, 0.6, 0.2)))


def sample_spec(rng: np.random.Generator, kind: str) -> Spec:
    background = _choice(rng, BACKGROUNDS)
    if kind == "count":
        item = Item(_choice(rng, COLOURS), _choice(rng, SHAPES))
        return Spec(kind, background, (item,), count=int(rng.integers(2, 5)))
    first = _sample_item(rng)
    if kind == "single":
        return Spec(kind, background, (first,))
    second = _sample_item(rng)
    while (first.colour, first.shape) == (second.colour, second.shape):
        second = _sample_item(rng)
    relation = _choice(rng, RELATIONS) if kind == "relation" else None
    return Spec(kind, background, (first, second), relation)


def _scatter(rng: np.random.Generator, radii: list[float], size: int) -> np.ndarray:
    """Centres (objects, 2) drawn uniformly from all arrangements that keep gap and margin."""
    radii = np.asarray(radii)
    low, high = MARGIN + radii, size - MARGIN - radii
    apart = radii[:, None] + radii[None, :] + GAP
    pairs = np.triu_indices(len(radii), 1)
    while True:
        centres = rng.uniform(low[:, None], high[:, None], size=(len(radii), 2))
        distance = np.abs(centres[:, None] - centres[None, :]).max(axis=-1)
        if (distance >= apart)[pairs].all():
            return centres


def _place_beside(rng: np.random.Generator, radii: list[float], relation: str, size: int) -> np.ndarray:
    """Centres of two objects, the second away from the first along the relation's axis and nearly level across it."""
    direction = np.asarray(RELATIONS[relation])
    axis = int(np.flatnonzero(direction)[0])
    first, second = radii if direction[axis] > 0 else radii[::-1]  # by position along the axis
    nearest = first + second + GAP
    widest = size - 2 * MARGIN - first - second
    distance = rng.uniform(nearest, min(widest, nearest + 20))
    start = rng.uniform(MARGIN + first, size - MARGIN - second - distance)
    along = np.array([start, start + distance])
    reach = MARGIN + max(first, second) + 5
    across = rng.uniform(reach, size - reach) + rng.uniform(-5, 5, size=2)
    centres = np.empty((2, 2))
    centres[:, axis], centres[:, 1 - axis] = along, across
    return centres if direction[axis] > 0 else centres[::-1]


def place(spec: Spec, rng: np.random.Generator, size: int = IMAGE_SIZE) -> tuple[Placed, ...]:
    """
    Draws radii and positions for what `spec` asks for. "A and B" is told in reading order: A has its centre in the
    upper left half of the picture, B in the lower right one, on either side of the diagonal that rises to the right.
    Where it is left open, or hangs on the other object, which of two is where, a small model likes to draw one twice.
    """
    items = spec.items * spec.count
    if spec.kind == "count":
        radii = [rng.uniform(*COUNTED_RADII)] * spec.count
    else:
        radii = [rng.uniform(*RADII[item.size]) for item in items]
    beside = spec.kind == "relation"
    centres = _place_beside(rng, radii, spec.relation, size) if beside else _scatter(rng, radii, size)
    while spec.kind == "two" and not centres[0].sum() < size < centres[1].sum():
        centres = _scatter(rng, radii, size)
    return tuple(Placed(item, float(x), float(y), radius) for item, (x, y), radius in zip(items, centres, radii))


def sample_caption(
    rng: np.random.Generator, kind: str | None = None, held_out: bool = False, faint: bool = False
) -> tuple[Spec, str]:
    """
    Draws a caption; of `kind` or of all kinds in the shares of `KINDS`, from the held-out tenth or the others, of
    anything or of a `faint` object at least.
    """
    if kind is None:
        kind = _choice(rng, KINDS, p=tuple(KINDS.values()))
    while True:
        spec = sample_spec(rng, kind)
        caption = write_caption(spec, rng)
        if is_held_out(caption) == held_out and (spec.is_faint() or not faint):
            return spec, caption


def sample_scene(
    rng: np.random.Generator, kind: str | None = None, held_out: bool = False, faint: bool = False
) -> Scene:
    """Draws a caption like `sample_caption` and a picture that it describes."""
    spec, caption = sample_caption(rng, kind, held_out, faint)
    return Scene(spec, place(spec, rng), caption)


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draws the scene as an antialiased RGB picture of `size` x `size` pixels."""
    supersampling = 4
    scale = supersampling * size / IMAGE_SIZE
    image = Image.new("RGB", (size * supersampling,) * 2, BACKGROUNDS[scene.spec.background])
    draw = ImageDraw.Draw(image)
    for placed in scene.objects:
        x, y, radius = placed.x * scale, placed.y * scale, placed.radius * scale
        colour = COLOURS[placed.item.colour]
        if placed.item.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        elif placed.item.shape == "square":
            draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    return image.reduce(supersampling)
