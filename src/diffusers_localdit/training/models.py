"""The transformer that a run trains: new, from another run or resolution, or with LoRA layers; and what it needs."""

from pathlib import Path
from typing import Any

import torch

from ..checkpoint_io import one_line
from ..kernels import try_triton_kernels
from ..model_info import locate
from ..transformer_localdit import LocalDiTTransformer2DModel
from .checkpoints import EMA, TRANSFORMER, latest_checkpoint
from .objective import initialize_weights
from .optimizers import optimizer_bytes
from .settings import TrainingSettings

VAE_SCALE_FACTOR = 8  # pixels of a picture to one of its latent
PATCH_SIZE = 2
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def build_transformer(settings: TrainingSettings) -> LocalDiTTransformer2DModel:
    """
    Build the transformer in float32, ready to train. Random weights come from torch's generator, to be seeded before.

    Its `sample_size` is that of the run's pictures, from which the scale of the position embedding follows by PixArt's
    rule, also where the weights are those of another resolution. With LoRA it stays that of the model to adapt.

    Raises:
        `ValueError`: There is nothing to start from, or it is of another architecture than the one asked for.
    """
    sample_size = settings.image_size // VAE_SCALE_FACTOR
    if settings.lora_rank is not None:
        base = settings.init_from or settings.pipeline
        if base is None:
            raise ValueError("LoRA layers adapt a model: give --init-from or --pipeline")
        transformer = read_transformer(base)
        check_architecture(transformer, settings)
        add_lora(transformer, settings.lora_rank)
    elif settings.init_from is not None:
        transformer = read_transformer(settings.init_from, sample_size=sample_size, interpolation_scale=None)
        check_architecture(transformer, settings)
    else:
        unknown = settings.architecture.keys() - LocalDiTTransformer2DModel._get_init_keys(LocalDiTTransformer2DModel)
        if unknown:
            raise ValueError(f"architecture: the transformer has no setting {sorted(unknown)[0]!r}")
        transformer = LocalDiTTransformer2DModel(**({"sample_size": sample_size} | settings.architecture))
        initialize_weights(transformer)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def read_transformer(source: str, **config: Any) -> LocalDiTTransformer2DModel:
    """
    Read a transformer, its averaged weights if it has such.

    Args:
        source (`str`): A training run's output, a checkpoint, pipeline or transformer folder, or a repository id.
        config (*optional*): What to change of its configuration.
    """
    place = locate(source)
    if isinstance(place, Path):
        place = latest_checkpoint(place / "checkpoints") or place
        if (place / TRANSFORMER).is_dir():
            place = place / TRANSFORMER
        if not (place / "config.json").exists():
            raise ValueError(f"{source} holds no transformer: no config.json in {place}")
        config["variant"] = EMA if any(place.glob(f"*.{EMA}.safetensors")) else None
    else:
        config["subfolder"] = TRANSFORMER
    try:
        return LocalDiTTransformer2DModel.from_pretrained(place, use_safetensors=True, dtype=torch.float32, **config)
    except Exception as error:  # whatever an incomplete or foreign folder, or the network, makes the libraries raise
        raise ValueError(f"cannot load the transformer of {source}: {one_line(error)}") from error


def check_architecture(transformer: LocalDiTTransformer2DModel, settings: TrainingSettings) -> None:
    for name, value in settings.architecture.items():
        if transformer.config.get(name) != value:
            raise ValueError(
                f"architecture asks for {name}: {value}, but the weights of {settings.init_from or settings.pipeline}"
                f" have {transformer.config.get(name)}"
            )


def add_lora(transformer: LocalDiTTransformer2DModel, rank: int) -> None:
    """Low-rank layers on every attention projection, the global branch's included; all else stays as it is."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("--lora-rank needs peft: pip install 'diffusers-localdit[train]'") from error
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_LAYERS)))


def use_kernels(
    transformer: LocalDiTTransformer2DModel, settings: TrainingSettings, device: torch.device
) -> str | None:
    """Let the Triton kernels compute the self-attention where they are faster. Returns what there is to say of it."""
    if not settings.kernels or device.type != "cuda" or settings.mixed_precision == "no":
        return None
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float16
    reason = try_triton_kernels(transformer, device, dtype, training=True)
    if reason is None:
        return "the Triton kernels compute the self-attention"
    return f"PyTorch computes the self-attention, which takes longer. {reason}"


def compile_blocks(transformer: LocalDiTTransformer2DModel, num_sizes: int) -> None:
    """
    Compile the blocks, for each size of pictures anew: PyTorch 2.13 cannot compile the training of a graph for all
    sizes ("cannot determine truth value of Relational"). For the same reason texts have to be padded to one length.
    """
    transformer._mark_dynamic = lambda *block_inputs: None
    # Training, validation and sampling come with their own batch sizes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 + 4 * num_sizes)
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


def memory_estimate(transformer: LocalDiTTransformer2DModel, settings: TrainingSettings) -> dict[str, int]:
    """
    Bytes that training takes on one device, by what they are for: as if nothing was divided among processes, without
    VAE and text encoder. Half precision is taken to halve all activations, which is a little less than it leaves.
    """
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    return {
        "weights": 4 * parameters,
        "gradients": 4 * trained,
        "optimizer": optimizer_bytes(settings, transformer),
        "EMA": 4 * trained if settings.ema_decay is not None else 0,
        "activations": activation_bytes(transformer, settings) // (1 if settings.mixed_precision == "no" else 2),
    }


def activation_bytes(transformer: LocalDiTTransformer2DModel, settings: TrainingSettings) -> int:
    """What the backward pass of one batch needs of the forward pass, in float32."""
    config, tokens = transformer.config, (settings.image_size // VAE_SCALE_FACTOR // PATCH_SIZE) ** 2
    with torch.device("meta"):  # computes without numbers
        meta = LocalDiTTransformer2DModel.from_config(config)
    everything = saved_bytes(meta, settings)
    if not settings.gradient_checkpointing:
        return everything
    meta.enable_gradient_checkpointing()
    outside = saved_bytes(meta, settings)
    width = config.num_attention_heads * config.attention_head_dim
    block_inputs = 4 * settings.batch_size * tokens * width * config.num_layers
    return outside + block_inputs + (everything - outside) // config.num_layers


def saved_bytes(transformer: LocalDiTTransformer2DModel, settings: TrainingSettings) -> int:
    """The memory of all tensors that autograd keeps of a forward pass, but the parameters."""
    side, config = settings.image_size // VAE_SCALE_FACTOR, transformer.config
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # which many tensors may share
        return tensor

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(settings.batch_size, *shape, device="meta")

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = transformer(
            zeros(config.in_channels, side, side),
            encoder_hidden_states=zeros(settings.text_tokens, config.caption_channels),
            timestep=zeros(),
            added_cond_kwargs={"resolution": zeros(2), "aspect_ratio": zeros(1)},
            encoder_attention_mask=zeros(settings.text_tokens),
        )
    for parameter in transformer.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    del output
    return sum(storage.nbytes() for storage in kept.values())
