"""Tar shards as WebDataset lays them out: the members of a sample follow each other and share a key."""

import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm

from ..checkpoint_io import one_line, written_whole

SHARD_CACHE = Path(HF_HOME) / "localdit_shards"
SHARD_NAME = "shard-{:06}.tar"
UNFINISHED = ".tmp"
PRECOMPUTE_SETTINGS = "precompute.json"  # what precomputed shards were made of, and how


class DataError(ValueError):
    """A whole data set that cannot be used; a single sample that cannot be is a `BrokenSample`."""


def is_url(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def expand(pattern: str) -> list[str]:
    """
    The shards that a path or URL with braces, or a path with wildcards, stands for.

    Args:
        pattern (`str`):
            `{a,b}` and `{0000..0012}` are replaced by their members in order, keeping leading zeros; then paths are
            globbed and sorted.

    Returns:
        `list[str]`: Each shard once. Paths are those of files that exist; URLs are not looked up.

    Raises:
        `DataError`: A part of the pattern matches no file.
    """
    shards = []
    for name in [pattern] if os.path.exists(pattern) else _expand_braces(pattern):
        found = [name] if is_url(name) or os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not found:
            raise DataError(f"{name} matches no file")
        shards += found
    return list(dict.fromkeys(shards))


def _expand_braces(pattern: str) -> Iterator[str]:
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if bounds:
        choices = [f"{number:0{len(bounds[1])}}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        choices = braces[1].split(",")
    for choice in choices:
        yield from _expand_braces(pattern[: braces.start()] + choice + pattern[braces.end() :])


def fetch(url: str, folder: str | os.PathLike = SHARD_CACHE) -> str:
    """
    The path of a whole local copy of a shard, downloaded unless it is there already.

    Of several processes that fetch at once each downloads; let one go first
    ([`~accelerate.Accelerator.local_main_process_first`]).
    """
    name = PurePosixPath(urlsplit(url).path).name
    path = Path(folder) / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if path.exists():
        return str(path)
    with written_whole(path, overwrite=True) as scratch:
        try:
            with urlopen(url, timeout=60) as answer, scratch.open("wb") as file:
                size = int(answer.headers["Content-Length"] or 0)
                with tqdm(desc=name, total=size or None, unit="B", unit_scale=True, leave=False) as progress:
                    while block := answer.read(1 << 20):
                        file.write(block)
                        progress.update(len(block))
        except (OSError, HTTPException) as error:
            raise DataError(f"cannot fetch {url}: {one_line(error)}") from error
        if size and scratch.stat().st_size != size:
            raise DataError(f"cannot fetch {url}: the connection ended after {scratch.stat().st_size} of {size} bytes")
    return str(path)


class TarIndex:
    """
    Random access to the samples of one shard, at 8 bytes of memory per sample.

    Only positions are kept and every access opens the file anew, so that an index can be shared by threads and by
    forked workers, and be sent to spawned ones.

    Args:
        path (`str` or `os.PathLike`): An uncompressed tar file. Its headers are read once, its contents are not.

    Raises:
        `DataError`: The file is no tar archive, is compressed, or is cut off.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        starts, last_key = [], None
        try:
            with self.path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # tarfile would keep them all
                    key, _ = _key_and_extension(member)
                    if key is not None and key != last_key:
                        starts.append(member.offset)
                        last_key = key
                # tarfile takes a cut or damaged header for the end; the real end is marked by a block of zeros.
                end = tar.offset
                file.seek(end)
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{path} cannot be read as an uncompressed tar archive: {one_line(error)}") from error
        if not whole:
            raise DataError(f"{path} is damaged or cut off at byte {end}; fetch or write it again")
        self.bounds = np.array([*starts, end], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @contextmanager
    def open(self, index: int) -> Iterator[tuple[str, dict[str, BinaryIO]]]:
        """The key of a sample, and its members by lower-case extension as files that are read as far as asked."""
        start, end = self.bounds[index : index + 2]
        with self.path.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                key, members = f"at byte {start}", {}  # until its name is read
                member = tar.next()
                while member is not None:
                    name, extension = _key_and_extension(member)
                    if name is not None:
                        key = name
                        members[extension] = tar.extractfile(member)
                    member = tar.next() if tar.offset < end else None
                yield key, members


def _key_and_extension(member: tarfile.TarInfo) -> tuple[str, str] | tuple[None, None]:
    """The name before and after the first dot of its last part; none for what WebDataset passes over, too."""
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name)
    if match is None or not member.isreg() or re.match(r"__[^/]*__(/|$)", member.name):
        return None, None
    return match[1], match[2].lower()


def write_shard(path: str | os.PathLike, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """
    Write a shard that is there as a whole or not at all, whose bytes depend on `samples` alone.

    Args:
        path (`str` or `os.PathLike`):
            The shard; until it is complete it is written to the same name with `.tmp` after it. Its folder exists.
        samples (`Iterable[tuple[str, dict[str, bytes]]]`):
            Keys, without dots and different from the key before, and their members by extension.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for key, members in samples:
                    for extension, content in members.items():
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        if _key_and_extension(member)[0] != key:
                            raise ValueError(f"{key!r} cannot be the key of a sample; expected a name without dots")
                        member.size = len(content)
                        tar.addfile(member, BytesIO(content))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
