"""
Inference Endpoints: text to image and image to image, by the code that lies in this repository.

Text to image: `{"inputs": PROMPT, "parameters": {...}}`. Image to image: `{"inputs": PICTURE, "parameters": {"prompt":
PROMPT, "strength": 0.6, ...}}`, the picture in base64. Guidance is by default that of the repository's first example
picture. Numbers out of range are brought into it; what cannot be understood raises `ValueError`, which the server
answers with status 400 and the message.
"""

import base64
import io
import math
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

MAX_PICTURE_PIXELS = 4096 * 4096
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")  # of the many that Pillow reads, some by other programs
RANGES = {
    "num_inference_steps": (1, 50),
    "guidance_scale": (1.0, 20.0),
    "strength": (0.0, 1.0),
    "seed": (0, 2**63 - 1),
}
TEXTS = ("prompt", "negative_prompt")
SIZES = ("height", "width")


class EndpointHandler:
    def __init__(self, path: str = ""):
        on_gpu = torch.cuda.is_available()
        self.text_to_image = DiffusionPipeline.from_pretrained(
            path,
            custom_pipeline=path,
            trust_remote_code=True,
            use_safetensors=True,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
        ).to("cuda" if on_gpu else "cpu")
        image_to_image = get_class_from_dynamic_module(path, "pipeline_localdit_img2img.py", trust_remote_code=True)
        self.image_to_image = image_to_image.from_pipe(self.text_to_image)
        self.defaults = self.example_settings(Path(path))

    def __call__(self, data: dict[str, Any]) -> PIL.Image.Image:
        inputs, given = data.get("inputs"), data.get("parameters") or {}
        settings = self.defaults | self.check(given)
        generator = torch.Generator()  # on the CPU: the same picture on every device
        if "seed" in settings:
            generator.manual_seed(settings.pop("seed"))
        else:
            generator.seed()

        if "prompt" not in settings:
            if not isinstance(inputs, str):
                raise ValueError("`inputs` must be a prompt, or a picture with `parameters.prompt`")
            if "strength" in settings:
                raise ValueError("`strength` needs a picture as `inputs` and the prompt as `parameters.prompt`")
            return self.text_to_image(inputs, generator=generator, **settings).images[0]

        image = self.read_picture(inputs)
        for name, pixels in zip(SIZES, (image.height, image.width)):
            settings.setdefault(name, self.fit_size(pixels))
        steps = settings.setdefault("num_inference_steps", 20)
        # At least one step of denoising is left. 49 * (1 / 49) is less than 1.
        settings["strength"] = max(settings.get("strength", 0.8), math.nextafter(1 / steps, 1))
        return self.image_to_image(image=image, generator=generator, **settings).images[0]

    @staticmethod
    def example_settings(folder: Path) -> dict[str, float]:
        """The guidance of the model's first example picture: what suits the model may be far from the pipeline's."""
        for picture in sorted(folder.glob("images/*.png"))[:1]:
            with PIL.Image.open(picture, formats=["PNG"]) as image:
                if (guidance_scale := image.text.get("localdit:guidance_scale")) is not None:
                    return {"guidance_scale": float(guidance_scale)}
        return {}

    def check(self, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise ValueError(f"`parameters` must be an object but is {given!r}")
        settings = {}
        for name, value in given.items():
            if name in TEXTS:
                if not isinstance(value, str):
                    raise ValueError(f"`{name}` must be a text but is {value!r}")
                settings[name] = value
            elif name in SIZES:
                settings[name] = self.fit_size(self.number(name, value))
            elif name in RANGES:
                low, high = RANGES[name]
                settings[name] = type(low)(min(max(self.number(name, value), low), high))
            else:
                raise ValueError(f"unknown parameter `{name}`; known are {', '.join([*TEXTS, *SIZES, *RANGES])}")
        return settings

    @staticmethod
    def number(name: str, value: Any) -> int | float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"`{name}` must be a number but is {value!r}")
        return value

    def fit_size(self, pixels: float) -> int:
        """The nearest size that the model can draw, at most double that of its training pictures."""
        config, scale = self.text_to_image.transformer.config, self.text_to_image.vae_scale_factor
        multiple = scale * config.patch_size
        return multiple * min(max(round(pixels / multiple), 1), 2 * config.sample_size // config.patch_size)

    @staticmethod
    def read_picture(inputs: Any) -> PIL.Image.Image:
        if isinstance(inputs, PIL.Image.Image):
            return inputs.convert("RGB")
        try:
            image = PIL.Image.open(io.BytesIO(base64.b64decode(inputs, validate=True)), formats=PICTURE_FORMATS)
        except Exception as error:
            raise ValueError(
                "`inputs` must be a PNG, JPEG or WebP picture in base64, if there is a `parameters.prompt`"
            ) from error
        if image.width * image.height > MAX_PICTURE_PIXELS:
            raise ValueError(f"the picture has {image.width} x {image.height} pixels; send a smaller one")
        try:
            return PIL.ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:
            raise ValueError(f"the picture cannot be read: {error}") from error
