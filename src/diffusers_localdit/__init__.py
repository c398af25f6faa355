"""Efficient-attention diffusion transformers for Hugging Face diffusers. Importing registers the classes there."""

from .conversion import register_single_file
from .model_info import BUNDLED_MODEL
from .pipeline_localdit import LocalDiTPipeline
from .pipeline_localdit_img2img import LocalDiTImg2ImgPipeline
from .registration import register
from .transformer_localdit import LocalDiTTransformer2DModel

__version__ = "0.1.0"
__all__ = ["BUNDLED_MODEL", "LocalDiTImg2ImgPipeline", "LocalDiTPipeline", "LocalDiTTransformer2DModel"]

register(LocalDiTTransformer2DModel, LocalDiTPipeline, LocalDiTImg2ImgPipeline)
register_single_file()
