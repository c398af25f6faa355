"""Pictures and captions as the transformer is given them, by the very code that the pipelines run."""

import torch
from diffusers.models import AutoencoderKL
from transformers import T5EncoderModel, T5Tokenizer

from ..checkpoint_io import one_line
from ..model_info import locate
from ..pipeline_localdit import LocalDiTPipeline

PARTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")


def load_parts(pipeline: str, *names: str, dtypes: dict[str, torch.dtype] | None = None) -> LocalDiTPipeline:
    """
    A pipeline of which only some parts are loaded; the others are `None`.

    Args:
        pipeline (`str`): Folder, repository id, or the name of the bundled model.
        names (`str`): Of the parts.
        dtypes (`dict[str, torch.dtype]`, *optional*): By the name of the part; float32 for what is not named.

    Raises:
        `ValueError`: It cannot be loaded, or lacks a part.
    """
    left_out = dict.fromkeys(part for part in PARTS if part not in names)
    dtypes = {"default": torch.float32} | (dtypes or {})
    try:
        pipe = LocalDiTPipeline.from_pretrained(locate(pipeline), **left_out, dtype=dtypes, use_safetensors=True)
    except Exception as error:  # whatever an incomplete or foreign folder, or the network, makes the libraries raise
        raise ValueError(f"cannot load the pipeline {pipeline}: {one_line(error)}") from error
    if missing := [name for name in names if getattr(pipe, name) is None]:
        raise ValueError(f"the pipeline {pipeline} has no {missing[0]}")
    return pipe


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Latents of pictures, scaled as the pipelines scale them (which know no shift).

    Args:
        vae ([`AutoencoderKL`]): In any dtype, on any device. One in float16 that overflows there runs in float32.
        pixel_values (`torch.Tensor` of shape `(pictures, 3, height, width)`): Colours from -1 to 1.

    Returns:
        `torch.Tensor` of shape `(pictures, channels, latent height, latent width)`: The mean of the posterior and not
        a sample, so that there is one answer; float32, on the device of `vae`.
    """
    with _pipeline(vae=vae)._safe_vae() as vae:
        posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    return posterior.mode().float() * vae.config.scaling_factor


@torch.no_grad()
def encode_captions(
    tokenizer: T5Tokenizer, text_encoder: T5EncoderModel, captions: list[str], max_length: int = 120
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Hidden states of the text encoder, padded to the longest caption. Text reaches the tokenizer as it is.

    Args:
        tokenizer ([`~transformers.T5Tokenizer`]): Tokenizer of the text encoder.
        text_encoder ([`~transformers.T5EncoderModel`]): In any dtype, on any device.
        captions (`list[str]`): At least one.
        max_length (`int`, defaults to 120): Tokens to which captions are cut (with a warning).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Embeddings `(captions, tokens, channels)` and attention mask
        `(captions, tokens)`, 1 for tokens to attend to. Where it is 1, the embeddings are those of
        [`LocalDiTPipeline.encode_prompt`], which pads to `max_length`: padding is masked in the encoder.
    """
    longest = max(len(input_ids) for input_ids in tokenizer(captions).input_ids)
    embeds, mask, _, _ = _pipeline(tokenizer=tokenizer, text_encoder=text_encoder).encode_prompt(
        captions,
        do_classifier_free_guidance=False,
        device=text_encoder.device,
        max_sequence_length=min(longest, max_length),
    )
    return embeds, mask


def _pipeline(**components) -> LocalDiTPipeline:
    return LocalDiTPipeline(**(dict.fromkeys(PARTS) | components))
