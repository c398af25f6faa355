"""Latents and text embeddings of batches: read, where they were precomputed, else encoded in the training loop."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..checkpoint_io import written_whole
from ..pipeline_localdit import LocalDiTPipeline
from .encode import encode_captions, encode_pictures, load_parts
from .models import VAE_SCALE_FACTOR
from .shards import PRECOMPUTE_SETTINGS

EMPTY_CAPTION = "empty_caption.safetensors"  # written by precompute beside its shards


class Conditioning:
    """
    Turns batches of the loader into what the transformer is trained on.

    The text encoder stays in memory only where batches hold pictures. Otherwise a few prompts (the empty one for
    dropped captions, and those of the validation pictures) are encoded once for the whole run and kept in a file.

    Args:
        pipeline (`str`, *optional*): Folder or repository id with VAE and text encoder.
        data_root (`str`): The data; a folder of precomputed shards knows its pipeline and the empty caption.
        precomputed (`bool`): Whether batches hold latents and embeddings.
        prompts (`list[str]`): What validation pictures show.
        cache (`Path`): File to keep the embeddings of prompts in.
        device (`torch.device`): Where to encode.
        text_tokens (`int`, *optional*): Length to pad all texts to; by default that of the longest in the batch.

    Raises:
        `ValueError`: There is no pipeline, or it cannot be loaded.
    """

    def __init__(
        self,
        pipeline: str | None,
        data_root: str,
        precomputed: bool,
        prompts: list[str],
        cache: Path,
        device: torch.device,
        text_tokens: int | None = None,
    ):
        self.data_root = Path(data_root)
        self.pipeline = pipeline or self._recorded_pipeline()
        self.device = device
        self.text_tokens = text_tokens
        self.encoders = None if precomputed else self._load("tokenizer", "text_encoder", "vae")
        self.sampler = self._load("vae", "scheduler") if prompts else None
        embeds = self._prompt_embeds(["", *prompts], cache)
        self.empty = embeds[0]
        self.prompt_embeds = embeds[1:]

    def __call__(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents `(B, C, h, w)`, text embeddings `(B, L, D)`, and their mask `(B, L)`, on the device, in float32."""
        if "latents" not in batch:
            embeds, mask = encode_captions(self.encoders.tokenizer, self.encoders.text_encoder, batch["captions"])
            return encode_pictures(self.encoders.vae, batch["pixel_values"]), *self.padded(embeds.float(), mask)
        latents, embeds, mask, dropped = (
            batch[name].to(self.device)
            for name in ("latents", "prompt_embeds", "prompt_attention_mask", "caption_dropped")
        )
        embeds, mask = self.padded(embeds, mask)
        empty, empty_mask = self.padded(self.empty[None], length=embeds.shape[1])
        return (
            latents,
            torch.where(dropped[:, None, None], empty, embeds),
            torch.where(dropped[:, None], empty_mask, mask),
        )

    def padded(
        self, embeds: torch.Tensor, mask: torch.Tensor | None = None, length: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Embeddings and mask with at least `length` tokens, and as many as the empty prompt has.

        Raises:
            `ValueError`: There are more tokens than all texts are padded to.
        """
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        length = self.text_tokens or max(length, len(self.empty), embeds.shape[1])
        missing = length - embeds.shape[1]
        if missing < 0:
            raise ValueError(
                f"a caption has {embeds.shape[1]} tokens, more than text_tokens: {length}; give a larger --text-tokens"
            )
        return F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))

    def _recorded_pipeline(self) -> str | None:
        path = self.data_root / PRECOMPUTE_SETTINGS
        return json.loads(path.read_text())["pipeline"] if path.exists() else None

    def _load(self, *names: str) -> LocalDiTPipeline:
        if self.pipeline is None:
            raise ValueError("give --pipeline: the folder or repository id of a pipeline with text encoder and VAE")
        text_dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        pipe = load_parts(self.pipeline, *names, dtypes={"text_encoder": text_dtype})
        if "vae" in names and pipe.vae_scale_factor != VAE_SCALE_FACTOR:
            raise ValueError(
                f"the VAE of {self.pipeline} makes one of {pipe.vae_scale_factor} pixels, not of {VAE_SCALE_FACTOR}"
            )
        return pipe.to(self.device)

    def _prompt_embeds(self, prompts: list[str], cache: Path) -> list[torch.Tensor]:
        """Embeddings `(tokens, D)` of each prompt, without padding."""
        known = self._kept_embeds(cache)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if missing:
            encoders = self.encoders or self._load("tokenizer", "text_encoder")
            for prompt in missing:  # one by one: no padding
                embeds, _ = encode_captions(encoders.tokenizer, encoders.text_encoder, [prompt])
                known[prompt] = embeds[0].float().cpu()
            with written_whole(cache, overwrite=True) as unfinished:
                tensors = {f"prompt {prompt}": embeds.contiguous() for prompt, embeds in known.items()}
                save_file(tensors, unfinished, {"pipeline": str(self.pipeline)})
        return [known[prompt].to(self.device) for prompt in prompts]

    def _kept_embeds(self, cache: Path) -> dict[str, torch.Tensor]:
        known = {}
        empty_caption = self.data_root / EMPTY_CAPTION
        if empty_caption.exists():
            known[""] = load_file(empty_caption)["prompt_embeds"].float()
        if cache.exists():
            with safe_open(cache, "pt") as file:
                if file.metadata()["pipeline"] == str(self.pipeline):
                    known |= {name.removeprefix("prompt "): file.get_tensor(name) for name in file.offset_keys()}
        return known
