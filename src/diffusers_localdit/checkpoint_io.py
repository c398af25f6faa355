"""Reading checkpoint files that nobody vouches for, and writing results that are complete or not there at all."""

import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt")
SAFETENSORS_SUFFIX = ".safetensors"
HUB_PROTOCOL = "hf://"
LFS_POINTER_START = b"version https://git-lfs"
TORCH_WRITE_ERROR = re.compile("inline_container|PytorchStreamWriter")
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class CheckpointError(ValueError):
    """
    A checkpoint that cannot be converted, or an output that cannot be written.

    The message is a single line of bounded length, whatever names it quotes from a hostile file.
    """

    def __init__(self, message: str):
        message = "".join(
            character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in message
        )
        super().__init__(message if len(message) <= 400 else f"{message[:300]} ... {message[-90:]}")


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fetched(checkpoint: str | os.PathLike) -> str | os.PathLike:
    """
    Get a file of the Hub that is named by an address like `hf://owner/name/path/in/repository`.

    Args:
        checkpoint (`str` or `os.PathLike`):
            The address, with the revision after an `@` behind the name if it is not the main one; or a path.

    Returns:
        `str` or `os.PathLike`: Where the file is in huggingface_hub's cache (its download goes on where a connection
        broke), or the path as it was given.

    Raises:
        `CheckpointError`: This is no address of a file, or the file cannot be had.
    """
    if not str(checkpoint).startswith(HUB_PROTOCOL):
        return checkpoint
    from huggingface_hub import hf_hub_download, parse_hf_uri

    try:
        address = parse_hf_uri(str(checkpoint))
        return hf_hub_download(address.id, address.path_in_repo, repo_type=address.type, revision=address.revision)
    except Exception as error:  # a wrong address, no such file, no access, a connection that broke, a full disk
        raise CheckpointError(f"cannot download {checkpoint}: {one_line(error)}") from error


def read_checkpoint(path: str | os.PathLike) -> Any:
    """
    Read a checkpoint without running any code of it; tensors are memory mapped where the format allows it.

    Args:
        path (`str` or `os.PathLike`):
            A `.safetensors` file, or a `.pt`, `.pth` or `.ckpt` file written by `torch.save`.

    Returns:
        `Any`: What the file holds, normally a dictionary of tensors (possibly nested).

    Raises:
        `CheckpointError`: The file is missing, empty, truncated, of another kind, or a pickle that would run code.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder; expected a .safetensors, .pt, .pth or .ckpt file")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} does not exist; expected a .safetensors, .pt, .pth or .ckpt file")
    if path.suffix not in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
        raise CheckpointError(f"{path} ends in {path.suffix!r}; expected .safetensors, .pt, .pth or .ckpt")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER_START))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path} is empty")
    if start == LFS_POINTER_START:
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` where it lies")
    return _read_safetensors(path) if path.suffix == SAFETENSORS_SUFFIX else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # whatever a broken header makes the parser or torch raise
        raise CheckpointError(f"{path} is no complete safetensors file ({one_line(error)})") from error


def _read_pickle(path: Path) -> Any:
    # The format before PyTorch 1.6 is no zip and cannot be mapped.
    mappable = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd pickle protocols precede the error itself
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        # Both a refusal and plain garbage arrive here; only a refusal names what the pickle wanted to call.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise CheckpointError(f"{path} is no complete PyTorch checkpoint (its pickle cannot be read)") from error
        raise CheckpointError(
            f"{path} is refused: its pickle asks for {wanted[1]}, and loading that would run code; ask its author for "
            "a .safetensors file, or for the state_dict alone saved with torch.save"
        ) from error
    except Exception as error:  # whatever a truncated or hostile archive makes the reader raise
        raise CheckpointError(f"{path} is no complete PyTorch checkpoint ({one_line(error)})") from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises `CheckpointError`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_to_replace(output: str | os.PathLike, inputs: list[str | os.PathLike | None], folder: bool) -> None:
    """Guard `--overwrite` against deleting what holds no model, or what is just being read."""
    output = Path(output)
    if not output.exists():
        return
    if output.is_dir() != folder:
        raise CheckpointError(f"{output} exists and is {'no folder' if folder else 'no file'}; choose another output")
    converted = any((output / name).exists() for name in ("model_index.json", "transformer/config.json"))
    if folder and not converted and any(output.iterdir()):
        raise CheckpointError(f"{output} exists and holds no converted model; choose another output")
    for source in inputs:
        if source is not None and Path(source).resolve().is_relative_to(output.resolve()):
            raise CheckpointError(f"{source} would be deleted by writing to {output}; choose another output")


def why_not_written(error: BaseException) -> str | None:
    """The reason in an exception of `WRITE_ERRORS`, or `None` where something else is wrong than the writing."""
    if isinstance(error, OSError):
        return error.strerror or one_line(error)
    if isinstance(error, SafetensorError):
        return one_line(error) if "Error while serializing" in str(error) else None
    if TORCH_WRITE_ERROR.search(str(error)):
        return "a file could not be written to its end"  # torch only says "unexpected pos 576 vs 534"
    return None


@contextmanager
def written_whole(output: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """
    Give a path to write a file or folder to, which becomes `output` only if the block ends without an exception.

    Args:
        output (`str` or `os.PathLike`):
            Where the result will be. Missing parent folders are made at the end.
        overwrite (`bool`, defaults to `False`):
            Whether an `output` that exists is replaced, after the block has succeeded.

    Yields:
        `Path`: A path that does not exist yet, on the same file system as `output`.

    Raises:
        `CheckpointError`: `output` exists and `overwrite` is off, or something cannot be written.
    """
    output = Path(os.path.abspath(output))
    if os.path.lexists(output) and not overwrite:
        raise CheckpointError(f"{output} exists; choose another output or pass --overwrite")
    anchor = next(parent for parent in output.parents if os.path.exists(parent))
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=anchor))
        yield scratch / output.name
        output.parent.mkdir(parents=True, exist_ok=True)
        _move_into_place(scratch / output.name, output, aside=scratch / "replaced")
    except WRITE_ERRORS as error:
        if (why := why_not_written(error)) is None or _concerns_another_file(error, scratch, output):
            raise
        raise CheckpointError(f"cannot write {output}: {why}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _concerns_another_file(error: Exception, scratch: Path | None, output: Path) -> bool:
    """Whether the files that an error names are none that are written, or a library has words of its own for it."""
    if not isinstance(error, OSError) or scratch is None:
        return False
    if error.errno is None:
        return True
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
    written = [name for name in named if Path(name).is_relative_to(scratch) or output.is_relative_to(name)]
    return bool(named) and not written


def _move_into_place(new: Path, output: Path, aside: Path) -> None:
    try:
        if os.path.lexists(output):
            os.rename(output, aside)
        os.rename(new, output)
    except BaseException:  # Ctrl-C among them
        if os.path.lexists(aside) and not os.path.lexists(output):
            os.rename(aside, output)
        raise
