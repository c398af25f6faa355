"""Efficient-attention diffusion transformers for Hugging Face diffusers. Importing registers the classes there."""

from .transformer_localdit import LocalDiTTransformer2DModel

__version__ = "0.1.0"
