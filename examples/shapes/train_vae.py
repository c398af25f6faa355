"""Trains the small `AutoencoderKL` of localdit-shapes on rendered scenes and saves it with its scaling factor.

The decoder sees latents with a little noise added, so that it stays crisp on the imperfect latents of a sampler.
Crops teach colours and edges fast; the model's norms average over all that is there, so whole pictures follow; the
decoder then has a round to itself, with the latents, and so the transformer's training data, as they are.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_cosine_schedule_with_warmup
from judge import judge
from scenes import Scene, render, sample_scene
from tqdm import tqdm


@dataclass(frozen=True)
class Round:
    steps: int
    learning_rate: float
    crop: int
    batch_size: int
    decoder_only: bool = False


ROUNDS = {
    "crops": Round(steps=1300, learning_rate=2e-3, crop=64, batch_size=16),
    "whole": Round(steps=1000, learning_rate=1.5e-3, crop=128, batch_size=8),
    "decoder": Round(steps=1500, learning_rate=1e-3, crop=128, batch_size=8, decoder_only=True),
}
LATENT_NOISE = 0.2  # highest noise that the decoder sees, in standard deviations of the latents
KL_WEIGHT = 1e-4


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
    """Rendered scenes (batch, 3, crop, crop) in -1..1; crops have an object near their middle."""
    return torch.stack([crop_scene(rng, sample_scene(rng), crop) for _ in range(batch_size)])


def crop_scene(rng: np.random.Generator, scene: Scene, crop: int) -> torch.Tensor:
    picture = torch.from_numpy(np.array(render(scene))).permute(2, 0, 1).float() / 127.5 - 1
    target = scene.objects[rng.integers(len(scene.objects))]
    left, top = (
        int(np.clip(centre - crop / 2 + rng.integers(-crop // 4, crop // 4 + 1), 0, picture.shape[1] - crop))
        for centre in (target.x, target.y)
    )
    return picture[:, top : top + crop, left : left + crop]


def vae_loss(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Weighted L1 + MSE of the reconstruction from noisy latents, + KL."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample()
    level = LATENT_NOISE * latents.detach().std() * torch.rand(len(latents), 1, 1, 1)
    decoded = vae.decode(latents + level * torch.randn_like(latents)).sample
    kl = posterior.kl().mean() / latents[0].numel()
    # Objects cover a tenth of a picture: they count for more, with both sides of their edges, so that these stay where
    # they are. The corner shows the background.
    is_object = ((pixels - pixels[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1).float()
    weight = 1 + 6 * F.max_pool2d(is_object, kernel_size=9, stride=1, padding=4)
    error = (decoded - pixels).abs() + (decoded - pixels).square()
    return (error * weight).mean() + KL_WEIGHT * kl


@torch.no_grad()
def validate(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio (dB) of reconstructions, and the standard deviation of the latents."""
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pixels.split(32)])
    decoded = torch.cat([vae.decode(batch).sample for batch in latents.split(32)]).clamp(-1, 1)
    mse = (((decoded - pixels) / 2) ** 2).mean(dim=(1, 2, 3))
    return float((-10 * mse.log10()).mean()), float(latents.std())


@torch.no_grad()
def reconstructions_right(vae: AutoencoderKL, pictures: int, seed: int) -> int:
    """How many of so many rendered `pictures` still show what their captions say, by the judge, when decoded again."""
    processor, rng, right = VaeImageProcessor(), np.random.default_rng(seed), 0
    for start in range(0, pictures, 32):
        scenes = [sample_scene(rng) for _ in range(min(32, pictures - start))]
        pixels = processor.preprocess([render(scene) for scene in scenes])
        decoded = processor.postprocess(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)
        right += sum(judge(picture, scene.spec).right for picture, scene in zip(decoded, scenes))
    return right


def train_round(vae: AutoencoderKL, plan: Round, rng: np.random.Generator, validation: torch.Tensor, output: Path):
    """Trains with warm-up and cosine decay; saves every hundred steps, with the scaling factor."""
    vae.requires_grad_(True)
    if plan.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=plan.learning_rate, betas=(0.9, 0.99))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=plan.steps)
    started = time.time()
    for step in tqdm(range(1, plan.steps + 1), mininterval=10):
        loss = vae_loss(vae, sample_pixels(rng, plan.batch_size, plan.crop))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == plan.steps:
            psnr, std = validate(vae, validation)
            minutes = (time.time() - started) / 60
            tqdm.write(f"step {step} ({minutes:.1f} min): loss {loss:.4f}, PSNR {psnr:.2f} dB, latent std {std:.3f}")
            if not plan.decoder_only:
                vae.register_to_config(scaling_factor=1 / std)
            vae.save_pretrained(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/shapes/vae"))
    parser.add_argument("--from-round", choices=ROUNDS, default="crops", help="later rounds go on from OUTPUT")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    validation = sample_pixels(np.random.default_rng(args.seed + 1), 64)
    first = list(ROUNDS).index(args.from_round)
    vae = AutoencoderKL.from_pretrained(args.output) if first else build_vae()
    for index, (name, plan) in enumerate(ROUNDS.items()):
        if index >= first:
            tqdm.write(f"{name}: {plan}")
            train_round(vae, plan, np.random.default_rng((args.seed, index)), validation, args.output)
    print(f"{reconstructions_right(vae, 320, args.seed + 2)} of 320 new pictures are judged right when decoded again")


if __name__ == "__main__":
    main()
