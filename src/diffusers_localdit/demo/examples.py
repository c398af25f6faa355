"""The example pictures that travel with a model in its folder `images`; their settings are in their files."""

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download

from ..model_info import locate
from ..png_settings import read_settings

FOLDER = "images"


class Example(NamedTuple):
    """A picture, the settings that made it, and the picture that it was made from, if it was."""

    path: Path
    settings: dict[str, Any]
    start: Path | None


def examples_of(model: str) -> list[Example]:
    """
    Find a model's examples.

    Args:
        model (`str`): Folder, repository id, or name of the bundled model.

    Returns:
        `list[Example]`: By name of file; pictures without settings, or whose start is not there, are none.
    """
    source = locate(model)
    if isinstance(source, str):
        source = Path(snapshot_download(source, allow_patterns=f"{FOLDER}/*.png"))
    return [example for path in sorted((source / FOLDER).glob("*.png")) if (example := _read(path)) is not None]


def _read(path: Path) -> Example | None:
    try:
        settings = read_settings(path)
    except ValueError:
        return None
    # Only a name counts: the file may be anybody's, and what it names is shown to visitors.
    start = path.with_name(Path(settings["image"]).name) if "image" in settings else None
    return Example(path, settings, start) if start is None or start.is_file() else None
