"""Small models and inputs that several test files use."""

import torch

from diffusers_localdit import LocalDiTTransformer2DModel


def tiny_transformer(seed: int = 0, **config) -> LocalDiTTransformer2DModel:
    """A random transformer in evaluation mode, every parameter non-zero (bias tables included)."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 5,
        "caption_channels": 16,
        "sample_size": 32,
        **config,
    }
    torch.manual_seed(seed)
    model = LocalDiTTransformer2DModel(**config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def random_inputs(height: int = 16, width: int = 16, batch_size: int = 2, text_tokens: int = 7, seed: int = 0) -> dict:
    """Keyword arguments of `forward` for a `tiny_transformer`; height and width in latent pixels."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch_size, text_tokens)
    mask[-1, text_tokens // 2 :] = 0
    return {
        "hidden_states": torch.randn(batch_size, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch_size, text_tokens, 16, generator=generator),
        "timestep": torch.randint(1000, (batch_size,), generator=generator),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[height * 8.0, width * 8.0]]).expand(batch_size, -1),
            "aspect_ratio": torch.full((batch_size, 1), width / height),
        },
        "encoder_attention_mask": mask,
    }


def map_tensors(function, inputs: dict) -> dict:
    """Applies a function to every tensor of nested keyword arguments."""
    return {
        name: map_tensors(function, value) if isinstance(value, dict) else function(value)
        for name, value in inputs.items()
    }


def in_dtype(dtype: torch.dtype, inputs: dict) -> dict:
    """Whole numbers stay what they are."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
