"""Trains the small `AutoencoderKL` of localdit-shapes on rendered scenes and saves it with its scaling factor.

The decoder sees latents with a little noise added, so that it stays crisp on the imperfect latents of a sampler.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from scenes import Scene, render, sample_scene
from tqdm import tqdm


def build_vae() -> AutoencoderKL:
    channels = (8, 24, 48, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        # One group: normalising few channels over a flat picture would take its colours away.
        norm_num_groups=1,
        sample_size=128,
        mid_block_add_attention=False,
    )


def sample_pixels(rng: np.random.Generator, batch_size: int, crop: int = 128) -> torch.Tensor:
    """Rendered scenes (batch, 3, crop, crop) in -1..1; a crop smaller than the picture has an object near its middle."""
    return torch.stack([crop_scene(rng, sample_scene(rng), crop) for _ in range(batch_size)])


def crop_scene(rng: np.random.Generator, scene: Scene, crop: int) -> torch.Tensor:
    picture = torch.from_numpy(np.array(render(scene))).permute(2, 0, 1).float() / 127.5 - 1
    target = scene.objects[rng.integers(len(scene.objects))]
    left, top = (
        int(np.clip(centre - crop / 2 + rng.integers(-crop // 4, crop // 4 + 1), 0, picture.shape[1] - crop))
        for centre in (target.x, target.y)
    )
    return picture[:, top : top + crop, left : left + crop]


def vae_loss(vae: AutoencoderKL, pixels: torch.Tensor, latent_noise: float, kl_weight: float) -> torch.Tensor:
    """Weighted L1 + MSE of the reconstruction from latents with up to `latent_noise` deviations of noise, + KL."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample()
    level = latent_noise * latents.detach().std() * torch.rand(len(latents), 1, 1, 1)
    decoded = vae.decode(latents + level * torch.randn_like(latents)).sample
    kl = posterior.kl().mean() / latents[0].numel()
    # Objects cover a tenth of a picture, the corner shows the background: both count about the same.
    is_object = ((pixels - pixels[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1).float()
    error = (decoded - pixels).abs() + (decoded - pixels).square()
    return (error * (1 + 6 * is_object)).mean() + kl_weight * kl


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
    parser.add_argument("--init-from", type=Path, help="a VAE to go on with, on whole pictures only")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop", type=int, default=64, help="side of the crops of the first 80%% of the steps")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--latent-noise", type=float, default=0.2, help="highest noise, in standard deviations")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    validation = sample_pixels(np.random.default_rng(args.seed + 1), 128)
    vae = AutoencoderKL.from_pretrained(args.init_from).train() if args.init_from else build_vae()
    optimizer = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=args.steps)

    started = time.time()
    for step in tqdm(range(1, args.steps + 1), mininterval=10):
        # The last steps see whole pictures, as the finished model does: the norms average over all that is there.
        whole = args.init_from is not None or step > 0.8 * args.steps
        pixels = sample_pixels(rng, args.batch_size // 2 if whole else args.batch_size, 128 if whole else args.crop)
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
