"""Trains the small `AutoencoderKL` of localdit-shapes on rendered scenes and saves it with its scaling factor.

The decoder sees latents with a little noise added, so that it stays crisp on the imperfect latents of a sampler.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from scenes import render, sample_scene
from tqdm import tqdm


def build_vae() -> AutoencoderKL:
    channels = (8, 24, 48, 48)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
        mid_block_add_attention=False,
    )


def sample_pixels(rng: np.random.Generator, batch_size: int) -> torch.Tensor:
    """Rendered scenes (batch, 3, height, width) in -1..1."""
    pictures = np.stack([np.asarray(render(sample_scene(rng))) for _ in range(batch_size)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae: AutoencoderKL, pixels: torch.Tensor, latent_noise: float, kl_weight: float) -> torch.Tensor:
    """L1 + MSE of the reconstruction from latents with up to `latent_noise` standard deviations of noise, + KL."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample()
    level = latent_noise * latents.detach().std() * torch.rand(len(latents), 1, 1, 1)
    decoded = vae.decode(latents + level * torch.randn_like(latents)).sample
    kl = posterior.kl().mean() / latents[0].numel()
    return F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + kl_weight * kl


@torch.no_grad()
def validate(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio (dB) of reconstructions, and the standard deviation of the latents."""
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pixels.split(32)])
    decoded = torch.cat([vae.decode(batch).sample for batch in latents.split(32)]).clamp(-1, 1)
    mse = (((decoded - pixels) / 2) ** 2).mean(dim=(1, 2, 3))
    return float((-10 * mse.log10()).mean()), float(latents.std())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/shapes/vae"))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--latent-noise", type=float, default=0.2, help="highest noise, in standard deviations")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    validation = sample_pixels(np.random.default_rng(args.seed + 1), 128)
    vae = build_vae()
    optimizer = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=args.steps)

    started = time.time()
    for step in tqdm(range(1, args.steps + 1), mininterval=10):
        pixels = sample_pixels(rng, args.batch_size)
        loss = vae_loss(vae, pixels, args.latent_noise, args.kl_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps:
            psnr, std = validate(vae, validation[:32] if step < args.steps else validation)
            minutes = (time.time() - started) / 60
            tqdm.write(f"step {step} ({minutes:.1f} min): loss {loss:.4f}, PSNR {psnr:.2f} dB, latent std {std:.3f}")

    vae.register_to_config(scaling_factor=1 / std)
    vae.save_pretrained(args.output)


if __name__ == "__main__":
    main()
