"""Loading a pipeline as the commands and the demo do: from the settings that a picture's file keeps."""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.torch_utils import get_device

from .checkpoint_io import one_line
from .kernels import try_cpu_kernels, try_triton_kernels
from .key_mapping import DTYPES
from .model_info import locate
from .packed_linear import pack_linears, why_not_packed
from .precision import fast_dtype, quantize_int8
from .streaming import stream_text_encoder
from .transformer_localdit import LocalDiTTransformer2DModel

logger = logging.get_logger(__name__)
# The pipelines' names of the settings that go to them; what is not given is left to their defaults.
PIPELINE_ARGUMENTS = {
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "strength": "strength",
}
PICTURE_DTYPES = (*DTYPES.values(), "int8")


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"there is no device {name!r}; choose --device {get_device()}") from error
    count = torch.accelerator.device_count() if device.type == get_device() else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ValueError(f"the device {name} is not available here; choose --device {get_device()}")
    return device


def default_dtype(device: torch.device) -> str:
    return DTYPES[fast_dtype(device)]


def load_pipeline(
    pipeline_class: type[DiffusionPipeline], settings: dict[str, Any], offload: str
) -> DiffusionPipeline:
    model, device = settings["model"], torch.device(settings["device"])
    source = locate(model)
    if isinstance(source, Path) and not (source / "model_index.json").exists():
        raise ValueError(
            f"{model} holds no pipeline: `localdit convert --pipeline-from` makes one of an original checkpoint, and a"
            " trained transformer is put into one by `LocalDiTPipeline.from_pretrained(PIPELINE, transformer=...)`"
        )
    int8 = settings["dtype"] == "int8"
    options = {"dtype": torch.float32 if int8 else getattr(torch, settings["dtype"]), "use_safetensors": True}
    components = {}
    try:
        if offload == "disk":
            components["text_encoder"] = stream_text_encoder(source, options["dtype"])
        pipe = pipeline_class.from_pretrained(source, **options, **components)
    except Exception as error:  # whatever an incomplete or foreign folder, or the network, makes the libraries raise
        where = "" if isinstance(source, Path) else "there is no such folder, nor such a repository: "
        raise ValueError(f"cannot load the model {model}: {where}{one_line(error)}") from error
    if not isinstance(pipe.transformer, LocalDiTTransformer2DModel):
        raise ValueError(f"{model} is no LocalDiT: its transformer is a {type(pipe.transformer).__name__}")

    if device.type == "cpu" and (reason := try_cpu_kernels(pipe.transformer)) is not None:
        logger.info(f"PyTorch computes the self-attention, which takes a little longer. {reason}")
    if int8:
        quantize_int8(pipe.transformer)
    elif why_not_packed(device, options["dtype"]) is None:
        pack_linears(pipe.transformer)
    elif device.type == "cuda" and options["dtype"] != torch.float32 and offload in ("none", "model"):
        reason = try_triton_kernels(pipe.transformer, device, options["dtype"])
        if reason is not None:
            logger.warning(f"PyTorch computes the self-attention, which takes longer. {reason}")
    if tile := settings.get("vae_tile"):
        if tile % (4 * pipe.vae_scale_factor) != 0:  # a quarter of a tile overlaps the next one
            raise ValueError(f"--vae-tile {tile} is not a multiple of {4 * pipe.vae_scale_factor}")
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = tile, tile // pipe.vae_scale_factor
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "none":
        pipe.to(device)
    return pipe


def default_settings(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What the pipeline does where nothing is asked for. Its default size is that of the pictures it returns."""
    parameters = inspect.signature(pipe.__call__).parameters
    defaults = {name: parameters[arg].default for name, arg in PIPELINE_ARGUMENTS.items() if arg in parameters}
    return defaults | {"negative_prompt": ""}
