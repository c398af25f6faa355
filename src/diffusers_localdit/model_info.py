"""Where a model is, and what it is made of, without loading its weights."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    parse_local_safetensors_file_metadata,
    parse_safetensors_file_metadata,
    snapshot_download,
)
from huggingface_hub.errors import HFValidationError, SafetensorsParsingError
from huggingface_hub.utils import validate_repo_id

from .checkpoint_io import one_line, read_json

BUNDLED_NAME = "localdit-shapes"
BUNDLED_MODEL = Path(__file__).parent / "models" / BUNDLED_NAME
WEIGHTS_STEMS = {"transformers": "model"}  # all other libraries: as diffusers
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Component(NamedTuple):
    """A part of a pipeline. `parameters` counts them by the dtype they are stored in; empty without weights."""

    name: str
    class_name: str
    parameters: Counter


def locate(model: str) -> Path | str:
    """
    Where a model is.

    Args:
        model (`str`): A folder, a repository id, or the name of the bundled model.

    Returns:
        `Path` or `str`: The folder, or the repository id as it was given.

    Raises:
        `ValueError`: There is no such folder, and the name cannot be a repository's.
    """
    if model == BUNDLED_NAME:  # a folder of this name is ./localdit-shapes
        if not BUNDLED_MODEL.is_dir():
            raise ValueError(f"the bundled model is missing at {BUNDLED_MODEL}; install the package again")
        return BUNDLED_MODEL
    if Path(model).is_dir():
        return Path(model).resolve()
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ValueError(f"there is no folder {model}, nor can this be a repository id like owner/name") from error
    return model


def describe(model: str) -> str:
    """
    What a model is made of: components, parameters, memory, layout of the windows.

    Args:
        model (`str`): As for `locate`. A folder may hold the transformer only, in its subfolder `transformer`.

    Returns:
        `str`: Lines to print.

    Raises:
        `ValueError`: There is no such model, or it is no LocalDiT.
        `OSError`: A file of it cannot be read or fetched.
    """
    source = locate(model)
    folder = source if isinstance(source, Path) else _fetch_configs(source)
    config_path = folder / "transformer" / "config.json"
    config = read_json(config_path) if config_path.exists() else {}
    if config.get("_class_name") != "LocalDiTTransformer2DModel":
        raise ValueError(f"{model} is no LocalDiT: its transformer is {config.get('_class_name', 'not there')}")
    components = list(_components(folder, repository=source if isinstance(source, str) else None))
    vae_config = folder / "vae" / "config.json"
    vae_scale_factor = 2 ** (len(read_json(vae_config)["block_out_channels"]) - 1) if vae_config.exists() else 8
    return "\n".join([f"{model} ({folder})", "", *_table(components), "", *_layout(config, vae_scale_factor)])


def _fetch_configs(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json"]))
    except OSError as error:
        raise ValueError(f"there is no folder {repository}, nor such a repository: {one_line(error)}") from error


def _components(folder: Path, repository: str | None) -> Iterator[Component]:
    index_path = folder / "model_index.json"
    index = (
        read_json(index_path)
        if index_path.exists()
        else {"transformer": ["diffusers_localdit", "LocalDiTTransformer2DModel"]}
    )
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[1] is None:  # versions and other settings; left out components
            continue
        library, class_name = entry
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no {name}, although its model_index.json lists one")
        parameters = Counter()
        if (folder / name / "config.json").exists():  # only models have one
            for file in _weight_files(folder / name, library):
                parameters.update(_parameter_count(folder, f"{name}/{file}", repository))
        yield Component(name, class_name, parameters)


def _weight_files(folder: Path, library: str) -> list[str]:
    single = WEIGHTS_STEMS.get(library, "diffusion_pytorch_model") + ".safetensors"
    index = folder / f"{single}.index.json"
    return sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [single]


def _parameter_count(folder: Path, file: str, repository: str | None) -> dict[str, int]:
    try:
        if repository is None or (folder / file).exists():
            return parse_local_safetensors_file_metadata(folder / file).parameter_count
        return parse_safetensors_file_metadata(repository, file).parameter_count
    except SafetensorsParsingError as error:
        raise ValueError(f"{folder / file} is no complete safetensors file") from error


def _table(components: list[Component]) -> list[str]:
    total = Component("all", "", sum((component.parameters for component in components), Counter()))
    rows = [("component", "class", "parameters", "stored as", "float32", "bf16, fp16")]
    for name, class_name, parameters in [*components, total]:
        count = parameters.total()
        dtypes = ", ".join(DTYPE_NAMES.get(dtype, dtype) for dtype in sorted(parameters))
        numbers = (f"{count:,}", dtypes, _megabytes(4 * count), _megabytes(2 * count)) if count else ("",) * 4
        rows.append((name, class_name, *numbers))
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    # Text to the left, numbers to the right.
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 1, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def _layout(config: dict[str, Any], vae_scale_factor: int) -> list[str]:
    heads, head_dim, window = config["num_attention_heads"], config["attention_head_dim"], config["window_size"]
    pixels = config["sample_size"] * vae_scale_factor
    side = config["sample_size"] // config["patch_size"]
    shifts = ", ".join(str(i % window) for i in range(config["num_layers"]))
    return [
        f"blocks          {config['num_layers']}, {heads * head_dim} wide ({heads} heads of {head_dim})",
        f"windows         {window} x {window} tokens, shifted block by block by {shifts}",
        f"global context  {'yes' if config['use_global_context'] else 'no'}",
        f"rotary          {'yes' if config['use_rope'] else 'no'}",
        f"default size    {pixels} x {pixels} pixels: {side} x {side} = {side**2:,} tokens in"
        f" {math.ceil(side / window) ** 2:,} windows a block",
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
