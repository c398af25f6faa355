"""Pictures with captions, or what was precomputed of them, by index: the kinds of DATA-ROOT."""

import hashlib
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from tqdm import tqdm

from ..checkpoint_io import one_line
from .pictures import PictureError, picture_size
from .shards import PRECOMPUTE_SETTINGS, SHARD_CACHE, DataError, TarIndex, expand, fetch, is_url

if TYPE_CHECKING:
    import datasets

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SHARD_PICTURES = ("jpg", "jpeg", "png", "webp")
SHARD_CAPTIONS = ("txt", "cap", "json")
CAPTION_FIELDS = ("text", "caption")
ENCODED = "safetensors"
METADATA_FILE = "metadata.jsonl"
MOST_BROKEN = 0.01  # of all samples; more stop what reads them
LARGEST_HEADER = 1 << 20  # bytes; what is no safetensors file may ask for any amount of memory


class BrokenSample(Exception):
    """A sample that cannot be used, for a reason that is told in one line."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class RawSample:
    """
    A sample as it is stored. It has either a `picture` or what was `encoded` of one.

    Args:
        name (`str`): What the sample is called in messages.
        picture (`bytes`, *optional*): A picture file.
        caption (`str`, *optional*): As it is written; never missing beside a `picture`.
        encoded (`bytes`, *optional*): A safetensors file with latents and embeddings.
    """

    name: str
    picture: bytes | None
    caption: str | None
    encoded: bytes | None = None


def normalize_caption(caption: str) -> str:
    """As the original prepared the captions that it was trained on."""
    return caption.lower().strip()


class Source(ABC):
    """
    Samples by index, in an order that is the same on every machine. Can be read from threads and worker processes.

    Whether samples are `precomputed` is the same for all of them.
    """

    precomputed = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> RawSample:
        """All of a sample. Raises [`BrokenSample`] where a part is missing or cannot be read."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """
        Height and width of a picture, or of the latents where they are precomputed, from the header alone.

        Raises [`BrokenSample`] where it cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """
        What tells this data set from others, equal on every machine: a hash of the names of all samples; of the names
        and sizes of shards; of the name and length of a data set by name.
        """


class FolderSource(Source):
    """Pictures in a folder and the folders in it, each with its caption in a `.txt` of the same name; by name."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.names = sorted(self._picture_names())
        if not self.names:
            raise DataError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}) and no .tar shards")
        if not any(self._caption_path(name).exists() for name in self.names):
            raise DataError(
                f"{folder} holds {len(self.names)} pictures and no captions; expected the caption of "
                f"{self.names[0]} in {self._caption_path(self.names[0]).name}, or all captions in {METADATA_FILE}"
            )

    def _picture_names(self) -> Iterator[str]:
        for path, _, files in os.walk(self.folder, followlinks=True):
            for file in files:
                if file.lower().endswith(PICTURE_SUFFIXES) and not file.startswith("."):
                    yield (Path(path) / file).relative_to(self.folder).as_posix()

    def _caption_path(self, name: str) -> Path:
        return (self.folder / name).with_suffix(".txt")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> RawSample:
        name = self.names[index]
        caption_path = self._caption_path(name)
        try:
            caption = caption_path.read_bytes() if caption_path.exists() else None
            picture = (self.folder / name).read_bytes()
        except OSError as error:
            raise BrokenSample(name, f"cannot be read ({error.strerror})") from error
        return RawSample(name, picture, _caption(name, caption))

    def size(self, index: int) -> tuple[int, int]:
        name = self.names[index]
        return _picture_size(name, self.folder / name)

    def fingerprint(self) -> str:
        return _hash(self.names)


class ImagefolderSource(Source):
    """Pictures in a folder that are listed in its `metadata.jsonl` (`file_name` and `text`), in that order."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        rows = (self.folder / METADATA_FILE).read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
        self.lines = [row for row in rows if row.strip()]
        if not self.lines:
            raise DataError(f"{self.folder / METADATA_FILE} is empty")

    def _row(self, index: int) -> tuple[str, str | None]:
        place = f"{METADATA_FILE} row {index + 1}"
        try:
            row = json.loads(self.lines[index])
        except ValueError as error:
            raise BrokenSample(place, f"is no JSON ({one_line(error)})") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise BrokenSample(place, "has no file_name")
        return row["file_name"], _caption_field(row)

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, index: int) -> RawSample:
        name, caption = self._row(index)
        try:
            picture = (self.folder / name).read_bytes()
        except OSError as error:
            raise BrokenSample(name, f"cannot be read ({error.strerror})") from error
        return RawSample(name, picture, _caption(name, caption))

    def size(self, index: int) -> tuple[int, int]:
        name, _ = self._row(index)
        return _picture_size(name, self.folder / name)

    def fingerprint(self) -> str:
        return _hash(self.lines)


class ShardSource(Source):
    """
    Samples of tar shards in their order: a picture and a caption, or `KEY.safetensors`, of which there is no other.

    Args:
        shards (`list[str]`): Local paths.
    """

    def __init__(self, shards: list[str]):
        progress = tqdm(shards, desc="Indexing shards", leave=False, disable=None)
        self.shards = [TarIndex(path) for path in progress]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        if not len(self):
            raise DataError(f"{shards[0]} holds no samples (members such as 0001.jpg and 0001.txt)")
        with self._open(0) as (_, members):
            self.precomputed = ENCODED in members

    @contextmanager
    def _open(self, index: int) -> Iterator[tuple[str, dict[str, BinaryIO]]]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[number]
        place = index - int(self.ends[number]) + len(shard)
        try:
            with shard.open(place) as (key, members):
                yield f"{shard.path.name}/{key}", members
        except (OSError, tarfile.TarError) as error:
            raise BrokenSample(f"{shard.path.name} sample {place}", f"cannot be read ({one_line(error)})") from error

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, index: int) -> RawSample:
        with self._open(index) as (name, members):
            if self.precomputed:
                return RawSample(name, None, None, self._member(name, members, (ENCODED,)).read())
            picture = self._member(name, members, SHARD_PICTURES).read()
            caption = self._member(name, members, SHARD_CAPTIONS).read()
            if not members.keys() & {"txt", "cap"}:
                caption = _json_caption(name, caption)
            return RawSample(name, picture, _caption(name, caption))

    def size(self, index: int) -> tuple[int, int]:
        with self._open(index) as (name, members):
            if self.precomputed:
                return _latents_size(name, self._member(name, members, (ENCODED,)))
            return _picture_size(name, self._member(name, members, SHARD_PICTURES))

    def _member(self, name: str, members: dict[str, BinaryIO], extensions: tuple[str, ...]) -> BinaryIO:
        for extension in extensions:
            if extension in members:
                return members[extension]
        raise BrokenSample(name, f"has no member {' or '.join(extensions)}")

    def fingerprint(self) -> str:
        return _hash(f"{shard.path.name} {shard.bounds[-1]}" for shard in self.shards)


class DatasetsSource(Source):
    """
    Rows of a data set of the `datasets` library, which needs an image column and a column `text` or `caption`.

    Args:
        dataset ([`~datasets.Dataset`]): One split.
        name (`str`): What it is called in messages.
    """

    def __init__(self, dataset: "datasets.Dataset", name: str):
        import datasets

        pictures = [column for column, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
        captions = [column for column in CAPTION_FIELDS if column in dataset.features]
        if not pictures or not captions:
            raise DataError(
                f"{name} has the columns {', '.join(dataset.features)}; expected one of images and one named "
                f"{' or '.join(CAPTION_FIELDS)}"
            )
        self.name = name
        self.picture_column, self.caption_column = pictures[0], captions[0]
        columns = dataset.select_columns([self.picture_column, self.caption_column])
        self.dataset = columns.cast_column(self.picture_column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> RawSample:
        row = self.dataset[index]
        name = self._name(index)
        return RawSample(name, self._picture(name, row), _caption(name, row[self.caption_column]))

    def size(self, index: int) -> tuple[int, int]:
        name = self._name(index)
        return _picture_size(name, BytesIO(self._picture(name, self.dataset[index])))

    def _name(self, index: int) -> str:
        return f"{self.name} row {index}"

    def _picture(self, name: str, row: dict[str, Any]) -> bytes:
        picture = row[self.picture_column]
        if picture is None or not (picture["bytes"] or picture["path"]):
            raise BrokenSample(name, "has no picture")
        try:
            return picture["bytes"] or Path(picture["path"]).read_bytes()
        except OSError as error:
            raise BrokenSample(name, f"cannot be read ({error.strerror})") from error

    def fingerprint(self) -> str:
        return _hash([self.name, str(len(self))])


def open_source(data_root: str | os.PathLike, shard_cache: str | os.PathLike = SHARD_CACHE) -> Source:
    """
    Open a data set by what `data_root` is.

    Args:
        data_root (`str` or `os.PathLike`):
            - a folder with `metadata.jsonl` (rows of `file_name` and `text`)
            - a folder of `.tar` shards; a path or URL of shards, which may hold `{0000..0012}` and, in a path, `*`
            - another folder: its pictures, each with a `.txt` of the same name
            - otherwise the name of a data set for `datasets.load_dataset`, of which the split `train` is taken
        shard_cache (`str` or `os.PathLike`, *optional*):
            Where shards are downloaded to; a folder beside those of the Hub unless given.

    Raises:
        `DataError`: There is nothing of these kinds, or it holds no sample.
    """
    root = os.fspath(data_root)
    if os.path.isdir(root):
        if os.path.exists(os.path.join(root, METADATA_FILE)):
            return ImagefolderSource(root)
        shards = sorted(str(path) for path in Path(root).glob("*.tar"))
        _require_complete(Path(root), len(shards))
        return ShardSource(shards) if shards else FolderSource(root)
    if is_url(root) or root.endswith(".tar") or set(root) & set("{*?["):
        return ShardSource([fetch(shard, shard_cache) if is_url(shard) else shard for shard in expand(root)])
    if os.path.exists(root):
        raise DataError(f"{root} is no folder and no .tar shard")
    if root.startswith((".", "/")) or root.count("/") > 1:
        raise DataError(f"{root} does not exist")
    return DatasetsSource(_load_dataset(root), root)


def _require_complete(folder: Path, found: int) -> None:
    """Refuses a folder that `localdit precompute` has not finished: training on a part would go unnoticed."""
    path = folder / PRECOMPUTE_SETTINGS
    settings = json.loads(path.read_text()) if path.exists() else {}
    expected = -(-settings.get("samples", 0) // settings.get("samples_per_shard", 1))
    if found < expected:
        raise DataError(
            f"{folder} is not precomputed to the end: {found} of {expected} shards are there; run the same `localdit "
            "precompute` again"
        )


def _load_dataset(name: str) -> "datasets.Dataset":
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"there is no {name} here; to take it as the name of a data set, run `pip install datasets`"
        ) from error
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # whatever the network or a foreign data set makes the library raise
        raise DataError(
            f"there is no {name} here, and no data set of that name can be loaded: {one_line(error)}"
        ) from error


def _caption(name: str, caption: bytes | str | None) -> str:
    if caption is None:
        raise BrokenSample(name, "has no caption")
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenSample(name, "has a caption that is not UTF-8") from error
    if not isinstance(caption, str):
        raise BrokenSample(name, f"has a caption that is no text but a {type(caption).__name__}")
    if not caption.strip():
        raise BrokenSample(name, "has an empty caption")
    return caption


def _caption_field(row: Any) -> Any:
    if not isinstance(row, dict):
        return None
    return next((row[field] for field in CAPTION_FIELDS if field in row), None)


def _json_caption(name: str, content: bytes) -> Any:
    try:
        return _caption_field(json.loads(content))
    except ValueError as error:
        raise BrokenSample(name, f"has a caption that is no JSON ({one_line(error)})") from error


def _picture_size(name: str, file: Path | BinaryIO) -> tuple[int, int]:
    try:
        return picture_size(file)
    except PictureError as error:
        raise BrokenSample(name, str(error)) from error


def _latents_size(name: str, file: BinaryIO) -> tuple[int, int]:
    """From the header of a safetensors file: its length in 8 bytes, then JSON."""
    try:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, LARGEST_HEADER)))
        _, height, width = header["latents"]["shape"]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenSample(name, "holds no latents (channels, height, width)") from error
    return height, width


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()
