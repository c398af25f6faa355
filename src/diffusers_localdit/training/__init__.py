"""Training: data, precomputed latents and embeddings, objective, checkpoints. Imported only where it is asked for."""

from .dataset import TrainingDataset, collate, training_loader
from .sources import open_source

__all__ = ["TrainingDataset", "collate", "open_source", "training_loader"]
