"""What the demo accepts: numbers in their ranges, texts and pictures of bounded size."""

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from PIL import Image

MAX_LETTERS = 2000
MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 4096 * 4096
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")


class Range(NamedTuple):
    """The numbers from `low` to `high` in steps of `step`: whole ones if `step` is."""

    low: float
    high: float
    step: float

    def check(self, label: str, value: Any) -> int | float:
        """The number itself, as an `int` where the range is of whole numbers; raises `ValueError`."""
        whole = isinstance(self.step, int)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and self.low <= value <= self.high
        if not fits or (whole and (value - self.low) % self.step != 0):
            steps = f" in steps of {self.step}" if whole and self.step > 1 else ""
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{label} must be {kind} from {self.low:,} to {self.high:,}{steps} but is {value!s:.40}")
        return int(value) if whole else float(value)

    def nearest(self, value: float) -> int | float:
        return min(max(round(value / self.step) * self.step, self.low), self.high)


def ranges_of(pipe: DiffusionPipeline) -> dict[str, Range]:
    """What numbers a model is given, by the names that settings have in a picture's file."""
    multiple = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    # Up to double the side of its training pictures.
    side = Range(multiple, 2 * pipe.transformer.config.sample_size * pipe.vae_scale_factor, multiple)
    return {
        "width": side,
        "height": side,
        "steps": Range(1, 50, 1),
        "guidance_scale": Range(1.0, 20.0, 0.1),
        "strength": Range(0.05, 1.0, 0.05),
        "seed": Range(0, 2**32 - 1, 1),
    }


def check_settings(settings: Mapping[str, Any], ranges: Mapping[str, Range]) -> dict[str, Any]:
    """
    Check all that a visitor sets.

    Args:
        settings (`Mapping[str, Any]`): Values by the names that they have in a picture's file.
        ranges (`Mapping[str, Range]`): What the numbers among them may be.

    Returns:
        `dict[str, Any]`: The settings, whole numbers as `int`.

    Raises:
        `ValueError`: A text is too long or missing, a number is none or out of its range, or hardly a step is left.
    """
    checked = {}
    for name, value in settings.items():
        label = name.replace("_", " ").capitalize()
        if name in ranges:
            checked[name] = ranges[name].check(label, value)
        elif not isinstance(value, str):
            raise ValueError(f"{label} must be a text but is {value!r:.40}")
        elif len(value) > MAX_LETTERS:
            raise ValueError(f"{label} has {len(value):,} letters; at most {MAX_LETTERS:,} are taken")
        else:
            checked[name] = value
    if not checked["prompt"].strip():
        raise ValueError("Prompt is empty; say what to draw")
    if int(checked["steps"] * checked.get("strength", 1.0)) < 1:
        raise ValueError(
            f"Strength {checked['strength']} of {checked['steps']} steps leaves none; choose more of one of them"
        )
    return checked


def read_upload(path: str | os.PathLike | None) -> Image.Image:
    """
    Read a picture that a visitor sent, after a look at what it claims to be.

    Args:
        path (`str` or `os.PathLike`, *optional*): The file; `None` is refused.

    Returns:
        `PIL.Image.Image`: The picture in RGB, the right way up.

    Raises:
        `ValueError`: There is none, or it is too large, of another kind, or broken.
    """
    if path is None:
        raise ValueError("There is no picture to start from; choose one")
    if os.path.getsize(path) > MAX_UPLOAD_BYTES:
        raise ValueError(f"The file has more than {MAX_UPLOAD_BYTES / 2**20:.0f} MiB; send a smaller one")
    kinds = f"{', '.join(UPLOAD_FORMATS[:-1])} or {UPLOAD_FORMATS[-1]}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # has its own limit below
            image = Image.open(path, formats=UPLOAD_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError("The picture has too many pixels; send a smaller one") from error
    except Exception as error:  # PIL raises much at files that are none of its own
        raise ValueError(f"The file is no {kinds} picture") from error
    with image:
        if image.width * image.height > MAX_UPLOAD_PIXELS:
            raise ValueError(
                f"The picture has {image.width:,} x {image.height:,} pixels; at most {MAX_UPLOAD_PIXELS:,} are taken"
            )
        try:
            return load_image(image)
        except Exception as error:
            raise ValueError("The picture cannot be read: its file is damaged") from error
