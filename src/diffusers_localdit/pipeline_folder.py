"""Making a folder with a converted transformer a whole pipeline, with components of another one."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_io import CheckpointError, one_line, read_json, write_json
from .model_info import BUNDLED_NAME, locate

# The sampler that the release was published with.
RELEASED_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    # Not its own settings, but what DDIM, DDPM and PNDM take over in its place: latents are not to be clipped to
    # -1 ... 1, and image to image may not start with Runge-Kutta steps.
    "clip_sample": False,
    "skip_prk_steps": True,
}

# Classes of the copied components, where the source has no model_index.json that names them.
COMPONENT_CLASSES = {
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# The entry of a component's configuration that has to equal an entry of the transformer's.
FITTING_SIZES = {"text_encoder": ("d_model", "caption_channels"), "vae": ("latent_channels", "in_channels")}
COPIED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")  # no pickles


def add_pipeline(
    folder: Path, source: str | os.PathLike, config: Mapping[str, Any], text_encoder: bool = True
) -> tuple[str, ...]:
    """
    Put a VAE, a text encoder, a tokenizer and the release's scheduler beside a transformer.

    Args:
        folder (`Path`):
            The folder with the subfolder `transformer`.
        source (`str` or `os.PathLike`):
            A folder or Hub repository with the subfolders `text_encoder`, `tokenizer` and `vae`.
        config (`Mapping[str, Any]`):
            The transformer's configuration.
        text_encoder (`bool`, defaults to `True`):
            Whether to take the text encoder and the tokenizer over; else the pipeline has none.

    Returns:
        `tuple[str, ...]`: Remarks for the report.

    Raises:
        `CheckpointError`: A component is not there, has no safetensors weights or does not fit the transformer.
    """
    from diffusers import DPMSolverMultistepScheduler, __version__

    names = [name for name in COMPONENT_CLASSES if text_encoder or name == "vae"]
    origin = _component_folder(source, names)
    index = read_json(origin / "model_index.json") if (origin / "model_index.json").exists() else {}
    components = {name: index.get(name, COMPONENT_CLASSES[name]) for name in names}
    for name in components:
        if not (origin / name).is_dir():
            raise CheckpointError(f"{source} has no folder {name}; expected {', '.join(components)}")
        if name in FITTING_SIZES:
            _require_fit(origin / name, config)
    for name in components:
        (folder / name).mkdir()
        for path in (path for pattern in COPIED_FILES for path in (origin / name).glob(pattern)):
            shutil.copyfile(path, folder / name / path.name)
    DPMSolverMultistepScheduler.from_config(RELEASED_SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "LocalDiTPipeline",
        "_diffusers_version": __version__,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        **components,
        "transformer": ["diffusers_localdit", "LocalDiTTransformer2DModel"],
    }
    write_json(folder / "model_index.json", index)
    return (
        f"{', '.join(components)} copied from {source}; the release was trained with FLAN-T5-XXL",
        "scheduler set to the release's DPMSolverMultistep, whatever the source has",
    )


def _component_folder(source: str | os.PathLike, names: list[str]) -> Path:
    if os.path.isdir(source) or source == BUNDLED_NAME:
        return Path(locate(str(source)))
    from huggingface_hub import snapshot_download

    patterns = [f"{name}/{pattern}" for name in names for pattern in COPIED_FILES]
    try:
        return Path(snapshot_download(str(source), allow_patterns=["model_index.json", *patterns]))
    except Exception as error:  # a wrong name, no such repository, no access, no network
        raise CheckpointError(f"{source} is no folder and no repository within reach: {one_line(error)}") from error


def _require_fit(component: Path, config: Mapping[str, Any]) -> None:
    theirs, ours = FITTING_SIZES[component.name]
    found = read_json(component / "config.json").get(theirs)
    if found != config[ours]:
        raise CheckpointError(f"{component} has {theirs}={found} but the transformer has {ours}={config[ours]}")
    if not any(component.glob("*.safetensors")):
        raise CheckpointError(f"{component} has no .safetensors weights")
