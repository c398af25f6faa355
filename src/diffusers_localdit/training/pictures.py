"""Picture files as the numbers that a VAE is given."""

import io
import os
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..checkpoint_io import one_line

TURNED = (5, 6, 7, 8)  # values of EXIF's Orientation that exchange height and width


class PictureError(ValueError):
    """A picture that cannot be used; the message is its reason in one line."""


def picture_size(file: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """
    Height and width of a picture as it is meant to be seen, from its header.

    Raises:
        `PictureError`: It is no picture that can be decoded, or too large.
    """
    try:
        with Image.open(file) as image:
            _refuse_bomb(image)
            # Without the condition Pillow would decode a whole PNG in search of EXIF data after the pixels.
            turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation) in TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # Pillow raises whatever a broken file makes its parsers raise
        raise _reason(error) from error


def decode(content: bytes) -> Image.Image:
    """
    A picture as 8-bit RGB, turned as its EXIF orientation says, with what is transparent over white.

    16-bit grey is scaled, not cut. Of an animation the first picture is taken. Colour profiles are not applied.

    Raises:
        `PictureError`: It is no picture, broken, too large, or of values whose range is unknown (32-bit, float).
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            _refuse_bomb(image)
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises whatever a broken file makes its parsers raise
        raise _reason(error) from error


def _reason(error: Exception) -> PictureError:
    # Pillow names the file, which may be an address in memory; whoever catches this has a better name.
    return PictureError("is no picture" if isinstance(error, UnidentifiedImageError) else one_line(error))


def _refuse_bomb(image: Image.Image) -> None:
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise PictureError(
            f"{image.width} x {image.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS = "
            f"{Image.MAX_IMAGE_PIXELS}; expected a smaller picture"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise PictureError("floating-point pixels have no known range; expected 8 or 16 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError("32-bit pixels have no known range; expected 8 or 16 bits per channel")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image,
    height: int,
    width: int,
    crop: Literal["center", "random"] = "center",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    The largest part of a picture that has the aspect ratio asked for, resized with antialiasing in one step.

    Args:
        image (`PIL.Image.Image`): In RGB.
        height (`int`): In pixels, of the result.
        width (`int`): In pixels, of the result.
        crop (`"center"` or `"random"`, defaults to `"center"`): Where the part lies; to whole pixels of `image`.
        generator (`torch.Generator`, *optional*): Chooses the place of a random crop.

    Returns:
        `torch.Tensor` of shape `(3, height, width)`: Float32, from -1 to 1.
    """
    scale = min(image.width / width, image.height / height)
    crop_width, crop_height = min(width * scale, image.width), min(height * scale, image.height)
    place_x, place_y = torch.rand(2, generator=generator).tolist() if crop == "random" else (0.5, 0.5)
    left = int(place_x * (int(image.width - crop_width) + 1))
    top = int(place_y * (int(image.height - crop_height) + 1))
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    part = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.asarray(part, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1
