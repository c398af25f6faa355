"""Converting released LocalDiT checkpoints: files and folders, the command line, and diffusers' `from_single_file`."""

import os

import torch

from .checkpoint_io import read_checkpoint
from .state_dict_conversion import convert_state_dict


def load_original(
    path: str | os.PathLike,
    window_size: int | None = None,
    sample_size: int = 128,
    use_rope: bool = True,
    global_context: str = "auto",
    dtype: torch.dtype | None = None,
):
    """
    Load an original checkpoint as a model, without writing anything; arguments as for `convert_checkpoint`.

    Returns:
        `LocalDiTTransformer2DModel`: The model, in evaluation mode.

    Raises:
        `CheckpointError`: As for `convert_checkpoint`.
    """
    from .transformer_localdit import LocalDiTTransformer2DModel

    state_dict, config, _ = convert_state_dict(
        read_checkpoint(path), window_size, sample_size, use_rope, global_context, dtype
    )
    with torch.device("meta"):
        model = LocalDiTTransformer2DModel(**config)
    # Cloned, so that training the model does not write into the mapped file's pages or into a sibling's storage.
    model.load_state_dict({name: tensor.clone() for name, tensor in state_dict.items()}, assign=True)
    return model.eval()
