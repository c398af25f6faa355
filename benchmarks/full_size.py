"""
Writes a pipeline of the full size with random weights, to measure time and memory with: the T5-XXL encoder in shards
of one layer, the 1024 pixel transformer, the VAE of SDXL. All in float16, 10 GB.

Its pictures are noise. Random numbers are repeated within a tensor, and tensors of one shape are equal.
"""

import argparse
import functools
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from diffusers_localdit import BUNDLED_MODEL, LocalDiTTransformer2DModel

T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}


@functools.cache
def random_tensor(shape: torch.Size) -> torch.Tensor:
    """Ones for vectors, else normal numbers that keep the variance of what they are multiplied by."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(min(shape.numel(), 1 << 20), generator=generator) * (shape[0] / shape.numel()) ** 0.5
    repeats = -(-shape.numel() // len(numbers))
    return numbers.half().repeat(repeats)[: shape.numel()].view(shape)


def write_text_encoder(folder: Path, layers: int) -> None:
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(num_layers=layers, **T5_XXL))
    folder.mkdir(parents=True)
    encoder.config.architectures = ["T5EncoderModel"]
    encoder.config.dtype = torch.float16
    encoder.config.save_pretrained(folder)
    shapes = {name: value.shape for name, value in encoder.state_dict().items() if "embed_tokens" not in name}
    weight_map = {name: f"{name.split('.')[2] if '.block.' in name else 'shared'}.safetensors" for name in shapes}
    for file in sorted(set(weight_map.values())):
        tensors = {name: random_tensor(shapes[name]).clone() for name in shapes if weight_map[name] == file}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    size = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_model(model: torch.nn.Module, folder: Path) -> None:
    state_dict = {name: random_tensor(value.shape).clone() for name, value in model.state_dict().items()}
    model.to(torch.float16).load_state_dict(state_dict, assign=True)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument("--text-layers", type=int, default=24, help="of the text encoder")
    parser.add_argument("--layers", type=int, default=18, help="of the transformer")
    parser.add_argument("--global-context", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args()

    write_text_encoder(args.folder / "text_encoder", args.text_layers)
    with torch.device("meta"):
        vae = AutoencoderKL(**SDXL_VAE)
        transformer = LocalDiTTransformer2DModel(num_layers=args.layers, use_global_context=args.global_context)
    write_model(vae, args.folder / "vae")
    write_model(transformer, args.folder / "transformer")
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(BUNDLED_MODEL / name, args.folder / name)
    shutil.copy(BUNDLED_MODEL / "model_index.json", args.folder)


if __name__ == "__main__":
    main()
