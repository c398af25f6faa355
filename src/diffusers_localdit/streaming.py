"""A text encoder that is read from disk as it runs, so that its size is no matter of memory."""

import json
from pathlib import Path

import torch
from accelerate import cpu_offload
from accelerate.utils import OffloadedWeightsLoader
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import T5Config, T5EncoderModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

SUBFOLDER = "text_encoder"


def stream_text_encoder(model: str | Path, dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    r"""
    The text encoder of a pipeline, on the CPU, without its weights: each layer reads its own from the safetensors
    files when it runs, and drops them after. Gives the same embeddings as the loaded encoder, bit by bit.

    `T5EncoderModel.from_pretrained(device_map={"": "disk"})` does so too, but reads and maps all weights when it
    loads: as much again from disk, and a resident set as large as the files.

    Args:
        model (`str` or `Path`): The pipeline's folder, or a repository id.
        dtype (`torch.dtype`, defaults to `torch.float32`):
            What to compute in, whatever the files hold; not float16, which T5 overflows.

    Returns:
        [`~transformers.T5EncoderModel`]: To be passed to the pipeline as `text_encoder`.

    Raises:
        `ValueError`: If `dtype` is float16.
        `OSError`: If the encoder's files are not there, or lack a weight.
    """
    if dtype == torch.float16:
        raise ValueError("T5 overflows in float16: stream the text encoder in bfloat16 or float32")
    if not Path(model).is_dir():
        patterns = [f"{SUBFOLDER}/{name}" for name in ("*.json", "*.safetensors")]
        model = snapshot_download(str(model), allow_patterns=patterns)
    folder = Path(model) / SUBFOLDER
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config.from_pretrained(folder))
    files = _weight_files(folder)
    index = {}
    for name in encoder.state_dict():
        stored = name if name in files else encoder.all_tied_weights_keys.get(name)
        if stored not in files:
            raise OSError(f"{folder} has no weight {name}")
        index[name] = {
            "safetensors_file": str(files[stored]),
            "weight_name": stored,
            "dtype": str(dtype).removeprefix("torch."),
        }
    cpu_offload(encoder.to(dtype).eval(), torch.device("cpu"), state_dict=OffloadedWeightsLoader(index=index))
    return encoder


def _weight_files(folder: Path) -> dict[str, Path]:
    """The file of each weight by its name."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / SAFE_WEIGHTS_NAME)
