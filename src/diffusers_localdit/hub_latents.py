"""
Loads a repository's folder, with the package or by the folder's own code, and writes the latents it samples.

`hub.verify` runs this text in a process of its own, outside of the package, which has to be absent for the second way.
"""

import sys

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from safetensors.torch import save_file


def load(folder: str, way: str) -> tuple[DiffusionPipeline, DiffusionPipeline]:
    if way == "installed":
        from diffusers_localdit import LocalDiTImg2ImgPipeline, LocalDiTPipeline

        text_to_image = LocalDiTPipeline.from_pretrained(folder, use_safetensors=True)
        return text_to_image, LocalDiTImg2ImgPipeline.from_pipe(text_to_image)

    sys.modules["diffusers_localdit"] = None  # an import now fails as if it were not there
    trust = {"trust_remote_code": True}
    text_to_image = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, use_safetensors=True, **trust)
    image_to_image = get_class_from_dynamic_module(folder, "pipeline_localdit_img2img.py", **trust)
    return text_to_image, image_to_image.from_pipe(text_to_image)


def sample(pipe: DiffusionPipeline) -> torch.Tensor:
    """Latents after two steps, at a small size that is no square."""
    side = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    height, width = 4 * side, 6 * side
    settings = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    if type(pipe).__name__ == "LocalDiTImg2ImgPipeline":
        picture = PIL.Image.linear_gradient("L").resize((width, height)).convert("RGB")
        settings |= {"image": picture, "strength": 1.0}
    if pipe.text_encoder is not None:
        settings |= {"prompt": "a red circle left of a blue square"}
    else:
        generator = torch.Generator().manual_seed(1)
        for name in ("prompt", "negative_prompt"):
            embeds = torch.randn(1, 8, pipe.transformer.config.caption_channels, generator=generator)
            settings |= {f"{name}_embeds": embeds, f"{name}_attention_mask": torch.ones(1, 8)}
    return pipe(height=height, width=width, **settings).images


if __name__ == "__main__":
    folder, way, output = sys.argv[1:]
    text_to_image, image_to_image = load(folder, way)
    save_file({"text_to_image": sample(text_to_image), "image_to_image": sample(image_to_image)}, output)
