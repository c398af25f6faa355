"""Converting released LocalDiT checkpoints: files and folders, the command line, and diffusers' `from_single_file`."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint_io import (
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    CheckpointError,
    fetched,
    one_line,
    read_checkpoint,
    refuse_to_replace,
    written_whole,
)
from .key_mapping import DTYPES
from .pipeline_folder import add_pipeline
from .state_dict_conversion import (
    ConversionReport,
    convert_state_dict,
    model_without_weights,
    original_state_dict,
    plan_conversion,
    unwrap,
)

if TYPE_CHECKING:
    from .transformer_localdit import LocalDiTTransformer2DModel

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

# Arguments of the command line that say how to read an original, with their defaults.
READING_DEFAULTS = {
    "window_size": None,
    "sample_size": 128,
    "no_rope": False,
    "global_context": "auto",
    "dtype": None,
    "pipeline_from": None,
}


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    window_size: int | None = None,
    sample_size: int = 128,
    use_rope: bool = True,
    global_context: str = "auto",
    dtype: torch.dtype | None = None,
    pipeline_from: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """
    Convert an original checkpoint file to a folder that `from_pretrained` loads.

    Args:
        checkpoint (`str` or `os.PathLike`):
            The original `.pt`, `.pth`, `.ckpt` or `.safetensors` file, or its address on the Hub, like
            `hf://owner/name/LocalDiT.pt`.
        output (`str` or `os.PathLike`):
            The folder to make. The model goes to its subfolder `transformer`.
        window_size, sample_size, use_rope, global_context, dtype:
            As for `convert_state_dict`.
        pipeline_from (`str` or `os.PathLike`, *optional*):
            A folder or Hub repository with `vae`, `text_encoder` and `tokenizer`, such as a PixArt-Sigma pipeline.
            `output` then becomes a whole pipeline, with the scheduler of the release.
        overwrite (`bool`, defaults to `False`):
            Replace an earlier conversion at `output`, once the new one is complete.

    Returns:
        `ConversionReport`: What was done; `print` it.

    Raises:
        `CheckpointError`: The checkpoint, an argument or the output is at fault. Nothing is left at `output`.
    """
    with written_whole(output, overwrite) as folder:
        refuse_to_replace(output, inputs=[checkpoint, pipeline_from], folder=True)
        state_dict, config, report = convert_state_dict(
            read_checkpoint(fetched(checkpoint)), window_size, sample_size, use_rope, global_context, dtype
        )
        transformer = folder / "transformer"
        transformer.mkdir(parents=True)
        model_without_weights(config).save_config(transformer)
        folded = {"global_context": "folded"} if report.outcome == "fold" else {}
        _save_safetensors(state_dict, transformer / WEIGHTS_NAME, metadata=folded)
        if pipeline_from is not None:
            report.remarks = add_pipeline(folder, pipeline_from, config)
    report.checkpoint, report.output = str(checkpoint), str(output)
    return report


def to_original(
    model: str | os.PathLike | Mapping[str, torch.Tensor], output: str | os.PathLike, overwrite: bool = False
) -> dict[str, torch.Size]:
    """
    Write a model in the original's layout, dead keys filled in so that the original's strict loading accepts it.

    Args:
        model (`str`, `os.PathLike` or `Mapping[str, torch.Tensor]`):
            A folder made by `convert_checkpoint` or `save_pretrained` (of the transformer or a pipeline), or a state
            dict. In a folder made by folding the fold is undone; anything else without the branch is written as an
            original with the branch off.
        output (`str` or `os.PathLike`):
            The `.safetensors`, `.pt`, `.pth` or `.ckpt` file to write.
        overwrite (`bool`, defaults to `False`):
            Replace an existing file.

    Returns:
        `dict[str, torch.Size]`: The names and shapes written.

    Raises:
        `CheckpointError`: The model is none of ours or not there, or the output cannot be written.
    """
    output = Path(output)
    if output.suffix not in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
        raise CheckpointError(f"{output} ends in {output.suffix!r}; expected .safetensors, .pt, .pth or .ckpt")
    with written_whole(output, overwrite) as path:
        refuse_to_replace(output, inputs=[], folder=False)
        state_dict, folded = (model, False) if isinstance(model, Mapping) else _read_model_folder(Path(model))
        original = original_state_dict(state_dict, folded)
        if output.suffix == SAFETENSORS_SUFFIX:
            _save_safetensors(original, path)
        else:
            # Cloned, because torch.save writes the whole storage behind a tensor: here, the mapped file.
            torch.save({name: tensor.clone() for name, tensor in original.items()}, path)
    return {name: tensor.shape for name, tensor in original.items()}


def load_original(
    path: str | os.PathLike,
    window_size: int | None = None,
    sample_size: int = 128,
    use_rope: bool = True,
    global_context: str = "auto",
    dtype: torch.dtype | None = None,
) -> "LocalDiTTransformer2DModel":
    """
    Load an original checkpoint as a model, without writing anything.

    Args:
        path (`str` or `os.PathLike`):
            The original `.pt`, `.pth`, `.ckpt` or `.safetensors` file.
        window_size, sample_size, use_rope, global_context, dtype:
            As for `convert_state_dict`.

    Returns:
        `LocalDiTTransformer2DModel`: The model, in evaluation mode.

    Raises:
        `CheckpointError`: As for `convert_state_dict`, or the file cannot be read.
    """
    state_dict, config, _ = convert_state_dict(
        read_checkpoint(path), window_size, sample_size, use_rope, global_context, dtype
    )
    model = model_without_weights(config)
    # Cloned, so that the model does not hold on to the mapped file and no two parameters share a storage.
    model.load_state_dict({name: tensor.clone() for name, tensor in state_dict.items()}, assign=True)
    return model.eval()


def register_single_file() -> None:
    """
    Let `LocalDiTTransformer2DModel.from_single_file(path)` load the original's files.

    diffusers hands an `original_config` together with the checkpoint to the function that makes the configuration;
    ours needs nothing but the checkpoint.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    SINGLE_FILE_LOADABLE_CLASSES["LocalDiTTransformer2DModel"] = {
        "checkpoint_mapping_fn": _single_file_state_dict,
        "config_mapping_fn": _single_file_config,
        "default_subfolder": "transformer",
    }


# diffusers passes those keyword arguments of `from_single_file` on that the next two functions name.


def _single_file_config(
    original_config: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    window_size: int | None = None,
    sample_size: int = 128,
    use_rope: bool = True,
    global_context: str = "auto",
) -> dict[str, Any]:
    if original_config:
        raise CheckpointError("an original checkpoint needs no original_config: the file says what the model is")
    tensors, _ = unwrap(checkpoint)
    return plan_conversion(tensors, window_size, sample_size, use_rope, global_context).config


def _single_file_state_dict(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any], global_context: str = "auto"
) -> dict[str, torch.Tensor]:
    given = {name: config[name] for name in ("window_size", "sample_size", "use_rope") if name in config}
    state_dict, found, _ = convert_state_dict(checkpoint, **given, global_context=global_context)
    for name, value in found.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"the configuration says {name}={config[name]} but the file makes it {value}")
    return state_dict


def _save_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except (SafetensorError, RuntimeError) as error:  # the latter if tensors of a hostile file share memory
        raise CheckpointError(f"cannot write {path.name}: {one_line(error)}") from error


def _read_model_folder(folder: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The state dict in a saved transformer's or pipeline's folder, and whether the global branch was folded in."""
    from safetensors import safe_open

    path = next(
        (path for path in (folder / "transformer" / WEIGHTS_NAME, folder / WEIGHTS_NAME) if path.exists()), None
    )
    if path is None:
        raise CheckpointError(f"{folder} holds no {WEIGHTS_NAME}, nor does {folder / 'transformer'}")
    state_dict = read_checkpoint(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return state_dict, metadata.get("global_context") == "folded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of a conversion on a parser (or subparser), for `run`."""
    parser.add_argument("checkpoint", help="original .pt, .pth, .ckpt or .safetensors file, or hf://OWNER/NAME/FILE")
    parser.add_argument("output", help="folder to make")
    parser.add_argument("--window-size", type=int, help="tokens on a window's side (default: as the file says, or 4)")
    parser.add_argument("--sample-size", type=int, help="training pixels / 8 (default: %(default)s)")
    parser.add_argument("--no-rope", action="store_true", help="the original ran without rotary embedding")
    parser.add_argument(
        "--global-context",
        metavar="auto|keep|fold|none|seed:N",
        help="what becomes of the global-context branch (default: keep it if it is in the file, else fold)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES.values()), help="default: as in the file")
    parser.add_argument(
        "--pipeline-from",
        metavar="DIR_OR_REPO",
        help="take vae, text_encoder and tokenizer from this pipeline and make OUTPUT a whole one",
    )
    parser.add_argument(
        "--to-original",
        action="store_true",
        help="the other way: CHECKPOINT is a converted folder, OUTPUT the file to write in the original's layout",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT once the new one is complete")
    parser.set_defaults(**READING_DEFAULTS)


def run(args: argparse.Namespace) -> None:
    """Carry out what `add_arguments` parsed and print a report; raises `CheckpointError`."""
    if args.to_original:
        for name, default in READING_DEFAULTS.items():
            if getattr(args, name) != default:
                raise CheckpointError(f"--{name.replace('_', '-')} has no meaning with --to-original; leave it out")
        written = to_original(args.checkpoint, args.output, overwrite=args.overwrite)
        print(f"{len(written)} keys of the original's layout written to {args.output}")
        return
    report = convert_checkpoint(
        args.checkpoint,
        args.output,
        window_size=args.window_size,
        sample_size=args.sample_size,
        use_rope=not args.no_rope,
        global_context=args.global_context,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        pipeline_from=args.pipeline_from,
        overwrite=args.overwrite,
    )
    print(report)
