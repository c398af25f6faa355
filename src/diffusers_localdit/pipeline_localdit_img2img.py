# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""
Image to image with LocalDiT.

This file imports nothing of the package it lies in, because the same bytes are shipped in Hub repositories as remote
code. For the same reason it holds one pipeline class; what it has in common with text to image stands under
`# Copied from`, and a test keeps both the same.
"""

import inspect
import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, PixArtImageProcessor, VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models import AutoencoderKL, ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
    ASPECT_RATIO_2048_BIN,
    retrieve_timesteps,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import T5EncoderModel, T5Tokenizer

logger = logging.get_logger(__name__)

# By the side in pixels of the square pictures that a model was trained on.
ASPECT_RATIO_BINS = {
    256: ASPECT_RATIO_256_BIN,
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
}

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers.utils import load_image
        >>> from diffusers_localdit import LocalDiTImg2ImgPipeline

        >>> pipe = LocalDiTImg2ImgPipeline.from_pretrained("path/to/localdit", dtype=torch.bfloat16).to("cuda")
        >>> sketch = load_image("sketch.png")
        >>> image = pipe("a lighthouse on a cliff at dusk", image=sketch, strength=0.6).images[0]
        ```
"""


class LocalDiTImg2ImgPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    r"""
    Image to image with LocalDiT: starts from a noised picture instead of pure noise.

    What every pipeline can do (loading, saving, moving between devices, offloading) is documented at
    [`DiffusionPipeline`]. LoRA weights load with [`~loaders.SanaLoraLoaderMixin.load_lora_weights`]. Large pictures
    are encoded and decoded in less memory after `pipe.vae.enable_slicing()` or `pipe.vae.enable_tiling()`.

    Args:
        tokenizer ([`~transformers.T5Tokenizer`]): Tokenizer of the text encoder. May be `None`, see `text_encoder`.
        text_encoder ([`~transformers.T5EncoderModel`]):
            T5 encoder. May be `None`: the pipeline is then called with `prompt_embeds`.
        vae ([`AutoencoderKL`]): Turns pictures into latents and back.
        transformer ([`LocalDiTTransformer2DModel`]): Predicts the noise in the latents.
        scheduler ([`SchedulerMixin`]): One of the schedulers of [`KarrasDiffusionSchedulers`].
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder"]
    _callback_tensor_inputs = [
        "latents",
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ]

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKL,
        transformer: ModelMixin,  # the model's class would be a relative import, which remote code cannot have
        scheduler: KarrasDiffusionSchedulers,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor,
            vae_latent_channels=self.vae.config.latent_channels if self.vae is not None else 4,
            do_convert_rgb=True,
        )

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline._dict_from_json_file
    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        # Every load reads `model_index.json` through here. A repository may carry the code of the pipeline and of the
        # model for those who lack the package; where this is the package, its own classes are named in their place,
        # so that no code of the repository is executed and no trust in it is asked for.
        config = super()._dict_from_json_file(json_file)
        if __package__ != "diffusers_localdit" or os.path.basename(json_file) != cls.config_name:
            return config
        for name, value in config.items():
            match value:
                case [_, "LocalDiTTransformer2DModel" as class_name]:
                    config[name] = [__package__, class_name]
                case [_, "LocalDiTPipeline" | "LocalDiTImg2ImgPipeline" as class_name] if name == "_class_name":
                    config[name] = class_name
        return config

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.from_pipe
    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        r"""
        Makes a pipeline of this class out of the components of another one. The components are shared, not copied, and
        keep their dtypes and devices.

        Args:
            pipeline ([`DiffusionPipeline`]): The pipeline whose components are taken.
            kwargs (*optional*):
                Components to use in place of `pipeline`'s, by name, and `torch_dtype` (or `dtype`) to cast to.

        Returns:
            A pipeline of this class.

        Raises:
            `ValueError`: If `pipeline` lacks a component that is not passed, or an argument is not a component.
        """
        # Not diffusers' own method, which drops a transformer whose type is not exactly the annotated one and, without
        # a dtype, casts the shared components to float32.
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", torch_dtype)
        names, _ = cls._get_signature_keys(cls)
        if unknown := kwargs.keys() - names:
            raise ValueError(
                f"`from_pipe` got {sorted(unknown)}, but the components of {cls.__name__} are {sorted(names)}."
            )
        components = {name: pipeline.components[name] for name in names if name in pipeline.components} | kwargs
        if missing := names - components.keys():
            raise ValueError(f"{type(pipeline).__name__} has no {sorted(missing)}: pass them to `from_pipe` by name.")

        new_pipeline = cls(**components)
        new_pipeline.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        if dtype is not None:
            new_pipeline.to(dtype=dtype)
        return new_pipeline

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline._get_t5_prompt_embeds
    def _get_t5_prompt_embeds(
        self, prompt: list[str], max_sequence_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text_inputs = self.tokenizer(
            prompt, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
        )
        for text, input_ids in zip(prompt, self.tokenizer(prompt).input_ids):
            if len(input_ids) > max_sequence_length:
                # The last token of both is the end-of-sequence token.
                removed_text = self.tokenizer.decode(input_ids[max_sequence_length - 1 : -1])
                logger.warning(
                    f"The end of a prompt was cut off, because it has {len(input_ids)} tokens and"
                    f" `max_sequence_length` is {max_sequence_length}: {removed_text!r} of {text!r}."
                )

        attention_mask = text_inputs.attention_mask.to(device)
        prompt_embeds = self.text_encoder(text_inputs.input_ids.to(device), attention_mask=attention_mask)[0]
        return prompt_embeds, attention_mask

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.encode_prompt
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int = 120,
    ):
        r"""
        Encodes prompts into the hidden states of the text encoder. Text reaches the tokenizer as it is.

        Args:
            prompt (`str` or `list[str]`, *optional*): Text to encode, unless `prompt_embeds` is given.
            do_classifier_free_guidance (`bool`, defaults to `True`): Whether negative embeddings are wanted.
            negative_prompt (`str` or `list[str]`, *optional*):
                Text to steer away from, one for all or one per prompt. The empty text by default.
            num_images_per_prompt (`int`, defaults to 1): How often each embedding is repeated.
            device (`torch.device`, *optional*): Where the embeddings are wanted; the execution device by default.
            prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, channels)`, *optional*):
                Embeddings made beforehand, with `prompt_attention_mask`.
            negative_prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, channels)`, *optional*):
                Negative embeddings made beforehand, with `negative_prompt_attention_mask`.
            prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`, *optional*): 1 = attend to the token.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`, *optional*):
                1 = attend to the token.
            max_sequence_length (`int`, defaults to 120): Tokens to which texts are padded or cut.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]`: embeddings and attention
            mask of the prompts, then of the negative prompts (`None` without guidance).
        """
        device = device or self._execution_device

        if prompt_embeds is None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds, prompt_attention_mask = self._get_t5_prompt_embeds(prompt, max_sequence_length, device)
        batch_size, sequence_length, _ = prompt_embeds.shape

        prompt_embeds = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        prompt_attention_mask = prompt_attention_mask.to(device).repeat_interleave(num_images_per_prompt, dim=0)

        if do_classifier_free_guidance:
            if negative_prompt_embeds is None:
                negative_prompt = negative_prompt or ""
                if isinstance(negative_prompt, str):
                    negative_prompt = [negative_prompt] * batch_size
                negative_prompt_embeds, negative_prompt_attention_mask = self._get_t5_prompt_embeds(
                    negative_prompt, sequence_length, device
                )
            negative_prompt_embeds = negative_prompt_embeds.to(device)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
            negative_prompt_attention_mask = negative_prompt_attention_mask.to(device)
            negative_prompt_attention_mask = negative_prompt_attention_mask.repeat_interleave(
                num_images_per_prompt, dim=0
            )
        else:
            negative_prompt_embeds, negative_prompt_attention_mask = None, None

        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.check_inputs
    def check_inputs(
        self,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int,
        max_sequence_length: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ):
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple != 0:
                nearest = max(round(size / multiple), 1) * multiple
                raise ValueError(
                    f"`{name}` must be a positive multiple of {multiple} but is {size}; the nearest valid value is"
                    f" {nearest}."
                )
        for name, count in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
            ("max_sequence_length", max_sequence_length),
        ):
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1 but is {count}.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number but is {guidance_scale}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent' but is {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be taken from {self._callback_tensor_inputs} but holds"
                f" {unknown}."
            )

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.check_prompt_inputs
    def check_prompt_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        max_sequence_length: int,
    ) -> int:
        """Checks all that says what to draw and returns the number of prompts."""
        if (prompt is None) == (prompt_embeds is None):
            given = "neither" if prompt is None else "both"
            raise ValueError(f"Exactly one of `prompt` and `prompt_embeds` must be passed, but {given} was.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError(
                "Only one of `negative_prompt` and `negative_prompt_embeds` can be passed, but both were."
            )
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if isinstance(text, list) and len(text) == 0:
                raise ValueError(f"`{name}` is an empty list; pass at least one text (which may be '').")
            if text is not None and not all(isinstance(t, str) for t in (text if isinstance(text, list) else [text])):
                raise ValueError(f"`{name}` must be a `str` or a list of `str` but is {text!r}.")

        needs_text_encoder = prompt is not None or (
            self.do_classifier_free_guidance and negative_prompt_embeds is None
        )
        if needs_text_encoder and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError(
                "This pipeline has no text encoder or tokenizer: pass `prompt_embeds` with `prompt_attention_mask` and"
                " either `negative_prompt_embeds` with `negative_prompt_attention_mask` or `guidance_scale=1.0`."
            )

        channels = self.transformer.config.caption_channels
        if prompt_embeds is None:
            expected_shape = (1 if isinstance(prompt, str) else len(prompt), max_sequence_length, channels)
        elif prompt_embeds.ndim == 3:
            expected_shape = (*prompt_embeds.shape[:2], channels)
        else:
            raise ValueError(
                f"`prompt_embeds` must have the shape (prompts, tokens, {channels}) but has"
                f" {tuple(prompt_embeds.shape)}."
            )
        batch_size = expected_shape[0]
        for name, embeds, mask in (
            ("prompt", prompt_embeds, prompt_attention_mask),
            ("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask),
        ):
            if (embeds is None) != (mask is None):
                raise ValueError(f"`{name}_embeds` and `{name}_attention_mask` must be passed together.")
            if embeds is not None and embeds.shape != expected_shape:
                raise ValueError(
                    f"`{name}_embeds` must have the shape {expected_shape} (prompts, tokens, channels) but has"
                    f" {tuple(embeds.shape)}."
                )
            if mask is not None and mask.shape != expected_shape[:2]:
                raise ValueError(
                    f"`{name}_attention_mask` must have the shape {expected_shape[:2]} (prompts, tokens) but has"
                    f" {tuple(mask.shape)}."
                )
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
            raise ValueError(
                f"`negative_prompt` must be one text or a list of {batch_size}, one per prompt, but has"
                f" {len(negative_prompt)}."
            )
        return batch_size

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.check_latents
    @staticmethod
    def check_latents(name: str, latents: torch.Tensor, shape: tuple[int, ...]):
        if latents.shape != shape:
            raise ValueError(f"`{name}` must have the shape {shape} but has {tuple(latents.shape)}.")
        if not torch.isfinite(latents).all():
            raise ValueError(f"`{name}` must be finite numbers but has NaN or infinite ones.")

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.check_generator
    @staticmethod
    def check_generator(generator: torch.Generator | list[torch.Generator] | None, num_images: int):
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"`generator` must be one generator or a list of {num_images}, one per picture, but has"
                f" {len(generator)}."
            )

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.check_sampling
    @staticmethod
    def check_sampling(finite: list[torch.Tensor], timesteps: torch.Tensor):
        # One transfer after the last step instead of one per step.
        finite = torch.stack(finite).tolist() if finite else []
        if not all(finite):
            step = finite.index(False)
            raise ValueError(
                f"The latents became NaN or infinite at step {step + 1} of {len(timesteps)} (timestep"
                f" {timesteps[step].item():g}). Half precision is the usual reason: load the transformer and the text"
                " encoder in `torch.bfloat16` or `torch.float32`."
            )

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.bin_size
    def bin_size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest size that the model was trained on, or the same size where there is no table for the model."""
        bins = ASPECT_RATIO_BINS.get(self.transformer.config.sample_size * self.vae_scale_factor)
        if bins is None or min(height, width) < 1:
            return height, width
        return PixArtImageProcessor.classify_height_width_bin(height, width, ratios=bins)

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.prepare_extra_step_kwargs
    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict[str, Any]:
        """Those of `generator` and `eta` that the scheduler's `step` takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}

    def get_timesteps(self, timesteps: torch.Tensor, num_inference_steps: int, strength: float) -> torch.Tensor:
        """The timesteps of the last `int(num_inference_steps * strength)` steps."""
        order = self.scheduler.order
        # A second-order scheduler lists custom timesteps twice.
        num_inference_steps = min(num_inference_steps, math.ceil(len(timesteps) / order))
        num_kept = int(num_inference_steps * strength) if 0 <= strength <= 1 else 0
        if num_kept == 0:
            smallest = math.ceil(1000 / num_inference_steps) / 1000
            raise ValueError(
                f"`strength` must be from {smallest} (one of {num_inference_steps} steps) to 1.0 but is {strength};"
                f" the nearest valid value is {1.0 if strength > 1 else smallest}."
            )
        start = (num_inference_steps - num_kept) * order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        return timesteps[start:]

    def default_size(self, image: PipelineImageInput | None, latents: torch.Tensor | None) -> tuple[int, int]:
        """Height and width in pixels of what sampling starts from; pictures are cut to multiples of the patch."""
        start = latents if latents is not None else image
        if isinstance(start, list) and len(start) > 0:
            start = start[0]
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        if isinstance(start, PIL.Image.Image):
            height, width = start.height, start.width
        elif isinstance(start, np.ndarray) and start.ndim >= 3:
            height, width = start.shape[-3:-1]
        elif isinstance(start, torch.Tensor) and start.ndim >= 3:
            height, width = start.shape[-2:]
            if start.shape[-3] == self.transformer.config.in_channels:
                return height * self.vae_scale_factor, width * self.vae_scale_factor
        else:
            raise ValueError(
                "`image` must be a PIL image, an array (height, width, 3), a tensor (3, height, width), latents, or a"
                f" batch or list of one of these, but is {type(start).__name__} {getattr(start, 'shape', '')}."
            )
        return max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple

    def preprocess_image(self, image: PipelineImageInput, batch_size: int, height: int, width: int) -> torch.Tensor:
        """Pictures as a tensor (images, 3, height, width) with values -1 to 1, latents as they are."""
        channels = self.transformer.config.in_channels
        first = image[0] if isinstance(image, list) else image
        is_latents = isinstance(first, torch.Tensor) and first.shape[-3] == channels

        image = self.image_processor.preprocess(image, height, width)
        if image.shape[0] not in (1, batch_size):
            raise ValueError(
                f"`image` must hold 1 picture or {batch_size}, one per prompt, but holds {image.shape[0]}."
            )
        if is_latents:
            shape = (image.shape[0], channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
            self.check_latents("image", image, shape)
        elif image.shape[1] != 3:
            raise ValueError(
                f"`image` must have 3 colours (or {channels} channels, if latents) but has {image.shape[1]}."
            )
        elif not image.abs().max() <= 1.001:  # as a negation, so that NaN is refused
            raise ValueError(
                "`image` must have values from 0 to 1, if an array or tensor; divide values from 0 to 255 by 255."
            )
        return image

    def encode_image(self, image: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Scaled latents of preprocessed pictures; latents are returned as they are."""
        if image.shape[1] == self.transformer.config.in_channels:
            return image.to(device=device, dtype=torch.float32)
        with self._safe_vae() as vae:
            # The mean, not a sample: the only randomness is the noise that comes on top.
            image_latents = vae.encode(image.to(device=device, dtype=vae.dtype)).latent_dist.mode()
            return image_latents.float() * vae.config.scaling_factor

    def prepare_latents(
        self,
        image_latents: torch.Tensor,
        num_images: int,
        timestep: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The latents of one image for all, or one per prompt, noised to `timestep`."""
        image_latents = image_latents.repeat_interleave(num_images // image_latents.shape[0], dim=0)
        noise = randn_tensor(image_latents.shape, generator, image_latents.device, torch.float32)
        return self.scheduler.add_noise(image_latents, noise, timestep.expand(num_images))

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.predict_noise
    def predict_noise(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        prompt_attention_mask: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor],
        step_cache: Any,
    ) -> torch.Tensor:
        """One call of the transformer: the predicted noise in float32, guided if guidance is on."""
        guided = self.do_classifier_free_guidance
        if guided:
            latents = torch.cat([latents, latents])
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
            prompt_attention_mask = torch.cat([negative_prompt_attention_mask, prompt_attention_mask])

        with self.transformer.cache_context("cond_uncond"):
            noise_pred = self.transformer(
                self.scheduler.scale_model_input(latents, timestep).to(self.transformer.dtype),
                encoder_hidden_states=prompt_embeds.to(self.transformer.dtype),
                timestep=timestep.expand(latents.shape[0]),
                added_cond_kwargs=added_cond_kwargs,  # one row for all: FasterCache leaves out half of the batch
                encoder_attention_mask=prompt_attention_mask,
                attention_kwargs=self.attention_kwargs,
                step_cache=step_cache,
                return_dict=False,
            )[0].float()

        if guided:
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)
        return noise_pred

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline._safe_vae
    @contextmanager
    def _safe_vae(self):
        """The VAE, in float32 for the while if it is in float16 and its configuration says that it overflows there."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.to(dtype=torch.float32)
        try:
            yield self.vae
        finally:
            if upcast:
                self.vae.to(dtype=torch.float16)

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.decode_latents
    def decode_latents(self, latents: torch.Tensor, height: int, width: int, output_type: str):
        """Pictures of `height` x `width` pixels; latents of another size (binning) are resized and cropped."""
        with self._safe_vae() as vae:
            image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        image = PixArtImageProcessor.resize_and_crop_tensor(image, width, height)
        return self.image_processor.postprocess(image, output_type=output_type)

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.guidance_scale
    @property
    def guidance_scale(self):
        return self._guidance_scale

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.do_classifier_free_guidance
    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale > 1.0

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.attention_kwargs
    @property
    def attention_kwargs(self):
        return self._attention_kwargs

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.num_timesteps
    @property
    def num_timesteps(self):
        return self._num_timesteps

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.current_timestep
    @property
    def current_timestep(self):
        return self._current_timestep

    # Copied from diffusers_localdit.pipeline_localdit.LocalDiTPipeline.interrupt
    @property
    def interrupt(self):
        return self._interrupt

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 120,
        use_resolution_binning: bool = False,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Makes pictures of what the prompts say that look like given pictures.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw. Either this or `prompt_embeds` is required.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these, *optional*):
                What to start from, one for all prompts or one per prompt. Arrays (height, width, 3) and tensors
                (3, height, width) have values 0 to 1. A tensor with as many channels as the transformer is taken for
                latents as `output_type="latent"` returns them. Either this or `latents` is required.
            strength (`float`, defaults to 0.8):
                How much to change, above 0 and up to 1. The last `int(num_inference_steps * strength)` steps are done,
                starting from `image` with as much noise as these remove; at 1 hardly anything of it is left.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from, one text for all prompts or one per prompt; the empty text by default. Without
                effect when guidance is off.
            height (`int`, *optional*):
                Height of the pictures in pixels, a multiple of 16 (of the VAE's scale factor times the patch size), to
                which `image` is resized. By default that of `image` (of the first one), cut to such a multiple, or of
                `latents` if these are given.
            width (`int`, *optional*): Width of the pictures in pixels, likewise.
            num_inference_steps (`int`, defaults to 20): Number of denoising steps at strength 1.
            timesteps (`list[int]`, *optional*):
                Descending timesteps to use in place of `num_inference_steps`, if the scheduler takes them.
            sigmas (`list[float]`, *optional*):
                Descending noise levels to use in place of `num_inference_steps`, if the scheduler takes them.
            guidance_scale (`float`, defaults to 7.0):
                How far to go from the unconditional prediction towards the prompt's and beyond (classifier-free
                guidance). 1.0 or less turns guidance off, which halves the work.
            num_images_per_prompt (`int`, defaults to 1): Number of pictures per prompt.
            eta (`float`, defaults to 0.0): Noise added by [`DDIMScheduler`], 0 to 1; other schedulers have none.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the result repeatable. With a list of one generator per picture, a picture does not depend on the
                others in its batch.
            latents (`torch.Tensor` of shape `(pictures, channels, latent height, latent width)`, *optional*):
                The noised start itself, for the first of the steps that `strength` leaves, in place of `image`.
            prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, caption_channels)`, *optional*):
                Text embeddings, see `encode_prompt`.
            prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`, *optional*):
                Required with `prompt_embeds`: 1 for tokens to attend to, else 0.
            negative_prompt_embeds (`torch.Tensor`, *optional*): Like `prompt_embeds`, for the negative prompts.
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): Required with `negative_prompt_embeds`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`; `"np"` (pictures, height, width, 3) or `"pt"` (pictures, 3, height, width) with values 0 to 1;
                `"latent"` for the float32 latents before the VAE.
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagePipelineOutput`].
            attention_kwargs (`dict`, *optional*): `scale` sets the weight of LoRA layers.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipeline, step, timestep, tensors)`; tensors in the `dict` it
                returns replace the pipeline's. Setting `pipeline._interrupt = True` ends the sampling.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Names of the tensors to hand to the callback, out of `_callback_tensor_inputs`.
            max_sequence_length (`int`, defaults to 120):
                Tokens to which prompts are padded or cut (with a warning that says what was cut off).
            use_resolution_binning (`bool`, defaults to `False`):
                Whether to sample at the nearest of PixArt's sizes for the model and resize and crop the pictures to
                `height` and `width`, which may then be any number of pixels. Off by default, as in the original
                LocalDiT, which samples at the size that is asked for. There are tables for models of 256, 512, 1024
                and 2048 pixels; with other models this changes nothing. Latents are returned at the binned size.

        Examples:

        Returns:
            [`ImagePipelineOutput`] with `images`, or a `tuple` with these.

        Raises:
            `ValueError`: If an argument is out of range or does not fit another one, or sampling yields numbers that
            are not finite.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False

        # 1. Size of the pictures and of the sample they are cut from
        default_height, default_width = self.default_size(image, latents)
        image_height = default_height if height is None else height
        image_width = default_width if width is None else width
        height, width = image_height, image_width
        if use_resolution_binning:
            height, width = self.bin_size(height, width)

        # 2. Check inputs
        self.check_inputs(
            height,
            width,
            num_inference_steps,
            guidance_scale,
            num_images_per_prompt,
            max_sequence_length,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        batch_size = self.check_prompt_inputs(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            max_sequence_length,
        )
        num_images = batch_size * num_images_per_prompt
        self.check_generator(generator, num_images)
        if latents is not None:
            latents_shape = (
                num_images,
                self.transformer.config.in_channels,
                height // self.vae_scale_factor,
                width // self.vae_scale_factor,
            )
            self.check_latents("latents", latents, latents_shape)
        else:
            image = self.preprocess_image(image, batch_size, height, width)
        device = self._execution_device

        # 3. Prepare timesteps, and keep those that `strength` leaves
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )
        timesteps = self.get_timesteps(timesteps, num_inference_steps, strength)
        num_inference_steps = math.ceil(len(timesteps) / self.scheduler.order)
        self._num_timesteps = len(timesteps)

        # 4. Encode prompts
        (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        ) = self.encode_prompt(
            prompt,
            self.do_classifier_free_guidance,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            device=device,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
        )

        # 5. Prepare latents, kept in float32 whatever the dtype of the transformer
        if latents is None:
            image_latents = self.encode_image(image, device)
            latents = self.prepare_latents(image_latents, num_images, timesteps[:1], generator)
        else:
            latents = latents.to(device=device, dtype=torch.float32)

        # 6. Prepare size conditions (aspect ratio as width / height, unlike PixArt) and arguments of the scheduler
        added_cond_kwargs = {
            "resolution": torch.tensor([[height, width]], dtype=torch.float32, device=device),
            "aspect_ratio": torch.tensor([[width / height]], dtype=torch.float32, device=device),
        }
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 7. Denoise; text and sizes are embedded at the first step, and again after each callback
        step_cache = self.transformer.make_step_cache()
        num_warmup_steps = max(len(timesteps) - num_inference_steps * self.scheduler.order, 0)
        finite = []
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t

                noise_pred = self.predict_noise(
                    latents,
                    t,
                    prompt_embeds,
                    prompt_attention_mask,
                    negative_prompt_embeds,
                    negative_prompt_attention_mask,
                    added_cond_kwargs,
                    step_cache,
                )
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for k in callback_on_step_end_tensor_inputs:
                        callback_kwargs[k] = locals()[k]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    # It may have changed text, guidance or weights (LoRA layers), in place too.
                    step_cache = self.transformer.make_step_cache()

                    latents = callback_outputs.pop("latents", latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    prompt_attention_mask = callback_outputs.pop("prompt_attention_mask", prompt_attention_mask)
                    negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
                    negative_prompt_attention_mask = callback_outputs.pop(
                        "negative_prompt_attention_mask", negative_prompt_attention_mask
                    )

                finite.append(latents.isfinite().all())
                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
        self._current_timestep = None
        self.check_sampling(finite, timesteps)

        # 8. Decode
        if output_type == "latent":
            image = latents
        else:
            image = self.decode_latents(latents, image_height, image_width, output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (image,)
        return ImagePipelineOutput(images=image)
