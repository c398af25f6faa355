"""The objective: epsilon prediction under the linear DDPM schedule, and the weights that training starts from."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn


def training_scheduler() -> DDPMScheduler:
    """
    The noise schedule that LocalDiT is trained under. Not the sampler's own class: before `set_timesteps`, the
    `add_noise` of `DPMSolverMultistepScheduler` takes timesteps from the wrong end.
    """
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", beta_start=0.0001, beta_end=0.02)


def diffusion_loss(
    transformer: nn.Module,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    prompt_attention_mask: torch.Tensor,
    resolution: torch.Tensor,
    aspect_ratio: torch.Tensor,
    snr_gamma: float | None = None,
    p2_gamma: float | None = None,
) -> torch.Tensor:
    r"""
    Squared error of the predicted noise, one number for each sample. Nothing in it is random.

    Args:
        transformer ([`LocalDiTTransformer2DModel`]): The model, possibly wrapped for several processes.
        scheduler ([`DDPMScheduler`]): See `training_scheduler`.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): Clean latents, scaled, float32.
        noise (`torch.Tensor` of the shape of `latents`): What is mixed in and is to be predicted.
        timesteps (`torch.Tensor` of shape `(batch,)`): Noise levels, 0 (least) to 999.
        prompt_embeds (`torch.Tensor` of shape `(batch, tokens, caption_channels)`): Text embeddings.
        prompt_attention_mask (`torch.Tensor` of shape `(batch, tokens)`): 1 = attend to the token.
        resolution (`torch.Tensor` of shape `(batch, 2)`): Height and width in pixels.
        aspect_ratio (`torch.Tensor` of shape `(batch, 1)`): Width / height.
        snr_gamma (`float`, *optional*): Weight the samples by min-SNR, see `min_snr_weight`.
        p2_gamma (`float`, *optional*): Weight the samples by a power of the SNR, see `p2_weight`.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    prediction = transformer(
        scheduler.add_noise(latents, noise, timesteps),
        encoder_hidden_states=prompt_embeds,
        timestep=timesteps,
        added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
        encoder_attention_mask=prompt_attention_mask,
    ).sample
    error = F.mse_loss(prediction.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        error = error * min_snr_weight(scheduler, timesteps, snr_gamma)
    if p2_gamma is not None:
        error = error * p2_weight(scheduler, timesteps, p2_gamma)
    return error


def signal_to_noise(scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(snr, gamma) / snr for epsilon prediction (Hang et al. 2023, https://arxiv.org/abs/2303.09556)."""
    snr = signal_to_noise(scheduler, timesteps)
    return snr.clamp(max=gamma) / snr


def p2_weight(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """
    1 / snr^gamma: P2 weighting (Choi et al. 2022, https://arxiv.org/abs/2204.00227) with its k = 0.

    The error of a trained model grows about as the cube root of the SNR, so that with gamma = 1/3 all timesteps weigh
    the same. Unweighted, the least noisy ones prevail, while what goes where is decided among the noisy ones.
    """
    return signal_to_noise(scheduler, timesteps) ** -gamma


def offset_noise(noise: torch.Tensor, offset: float) -> torch.Tensor:
    """
    Gives the mean of each channel of the noise a standard deviation of `offset` beyond its own.

    Distributed as `noise + offset * z` with z ~ N(0, 1) for each channel, but without another random draw: the mean of
    h w numbers of white noise is independent of what is left of them, so it may as well be stretched to the variance
    of the sum, 1 / (h w) + offset^2.

    Args:
        noise (`torch.Tensor` of shape `(batch, channels, height, width)`): White noise.
        offset (`float`): 0 changes nothing.

    Returns:
        `torch.Tensor` of the shape of `noise`.
    """
    if offset == 0:
        return noise
    places = noise.shape[-2] * noise.shape[-1]
    return noise + noise.mean(dim=(2, 3), keepdim=True) * ((1 + offset**2 * places) ** 0.5 - 1)


def initialize_weights(transformer: nn.Module) -> None:
    """
    PixArt's initialisation: Xavier-uniform linears with zero bias, small normals for the embedders, and no
    cross-attention and no output at the start. What is not named keeps what the model's constructor gave it.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for embedder in (transformer.adaln_single, transformer.caption_projection):
        for module in embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    nn.init.xavier_uniform_(transformer.pos_embed.proj.weight.flatten(1))
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.cross_attn.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)
