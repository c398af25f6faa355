"""The settings that made a picture, kept in its PNG file: one text chunk per setting, named `localdit:<setting>`."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

PREFIX = "localdit:"
# What PIL raises at the various ways to be broken, and at more pixels than it takes.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# What is kept, and as what it is read back.
SETTINGS = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "steps": int,
    "guidance_scale": float,
    "height": int,
    "width": int,
    "strength": float,
    "image": str,
    "image_sha256": str,
    "model": str,
    "dtype": str,
    "device": str,
    "vae_tile": int,
    "scheduler": str,
    "version": str,
}


def picture_digest(image: Image.Image) -> str:
    """What `image_sha256` is of the picture that image-to-image started from: of its size and pixels, not its file."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def settings_chunks(settings: Mapping[str, Any]) -> PngInfo:
    """
    Settings as the `pnginfo` argument of `PIL.Image.Image.save`.

    Args:
        settings (`Mapping[str, Any]`): Values by name; those named in `SETTINGS` are kept.

    Returns:
        `PngInfo`: The text chunks.
    """
    chunks = PngInfo()
    for name, kind in SETTINGS.items():
        if name in settings:
            chunks.add_text(PREFIX + name, str(kind(settings[name])))
    return chunks


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read what `settings_chunks` wrote.

    Args:
        path (`str` or `os.PathLike`): A PNG file.

    Returns:
        `dict[str, Any]`: Values by name, in the types of `SETTINGS`. Never empty.

    Raises:
        `ValueError`: The file cannot be read, is no PNG, has no settings, or one that is not of its type.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = dict(image.text)
    except UNREADABLE as error:
        raise ValueError(f"cannot read {path} as a PNG file: {error}") from error

    settings = {}
    for name, kind in SETTINGS.items():
        if (value := text.get(PREFIX + name)) is None:
            continue
        try:
            settings[name] = kind(value)
        except ValueError as error:
            raise ValueError(
                f"{path} has {name}={value[:40]!r} among its settings, which is no {kind.__name__}"
            ) from error
    if not settings:
        raise ValueError(
            f"{path} carries no settings: pictures keep them as PNG files, as long as no editor drops them"
        )
    return settings
