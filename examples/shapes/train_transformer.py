"""Trains the LocalDiT of localdit-shapes on the latents of `make_latents.py`. Run again to resume.

The original's objective (epsilon mean squared error, AdamW, caption dropout 0.1, EMA) with two deviations, for want of
steps: the error in each of 20 ranges of timesteps is divided by its own running mean, so that none outweighs the rest
(EDM2, https://arxiv.org/abs/2312.02696, learns such weights), and most timesteps come from around the middle, where
text and noise decide what goes where.

`torchrun --nproc-per-node 2 examples/shapes/train_transformer.py` doubles the batch on two cores.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from make_latents import load_latents
from tqdm import tqdm

from diffusers_localdit import LocalDiTTransformer2DModel
from diffusers_localdit.training.objective import initialize_weights

CAPTION_DROPOUT = 0.1
TIMESTEPS = 1000
TIMESTEP_RANGES = 20
SHARE_AROUND_THE_MIDDLE = 0.7
LOSS_SCALE = 0.15  # sets where the gradient is clipped


def build_transformer(caption_channels: int) -> LocalDiTTransformer2DModel:
    """Six blocks, so that all four window shifts occur, on 8 x 8 tokens."""
    transformer = LocalDiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=24,
        num_layers=6,
        caption_channels=caption_channels,
        sample_size=16,
    )
    initialize_weights(transformer)
    return transformer


def learning_rate_factor(step: int, warmup: int, steps: int, decay: int) -> float:
    """Warm-up, plateau, linear decay to zero."""
    return max(min((step + 1) / warmup, 1.0, (steps - step) / decay), 0.0)


def draw_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform ones, and a share from a normal distribution around the middle."""
    uniform = torch.randint(TIMESTEPS, (count,), generator=generator)
    middle = (torch.randn(count, generator=generator) * 0.18 + 0.5).mul(TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
    return torch.where(torch.rand(count, generator=generator) < SHARE_AROUND_THE_MIDDLE, middle, uniform)


def relative_error(error: torch.Tensor, timesteps: torch.Tensor, typical: torch.Tensor) -> torch.Tensor:
    """Errors `(B,)` divided by `typical` `(TIMESTEP_RANGES,)`, the running means, updated, of their timesteps."""
    place = (timesteps * TIMESTEP_RANGES // TIMESTEPS).cpu()
    for i, value in zip(place.tolist(), error.tolist()):
        typical[i] = value if typical[i] == 0 else torch.lerp(typical[i], torch.tensor(value), 0.02)
    return error / typical[place].to(error.device)


def prediction_error(transformer, scheduler, latents, text, mask, timesteps, generator) -> torch.Tensor:
    """Mean squared error of the noise predicted for each picture (DDPM, epsilon), `(B,)`."""
    batch_size, device = len(latents), latents.device
    # Drawn on the CPU, so that every device trains on the same numbers.
    noise = torch.randn(latents.shape, generator=generator).to(device)
    pixels = float(latents.shape[-1] * 8)
    sample = transformer(
        scheduler.add_noise(latents, noise, timesteps),
        encoder_hidden_states=text,
        timestep=timesteps,
        added_cond_kwargs={
            "resolution": torch.full((batch_size, 2), pixels, device=device),
            "aspect_ratio": torch.ones(batch_size, 1, device=device),
        },
        encoder_attention_mask=mask,
    ).sample
    return F.mse_loss(sample, noise, reduction="none").mean(dim=(1, 2, 3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("out/shapes"), help="folder that make_latents.py wrote")
    parser.add_argument("--output", type=Path, default=Path("out/shapes/transformer"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--decay-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per process")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--ema-decay", type=float, default=0.998)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    data = load_latents(args.data)
    transformer = build_transformer(data.embeddings.shape[-1])
    transformer.to(accelerator.device)
    ema = EMAModel(transformer.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=3 / 4)
    # Not the sampler's own class: before `set_timesteps`, DPMSolver's `add_noise` takes timesteps from the wrong end.
    scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS, beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)

    state_file = args.output / "training_state.pt"
    step, typical = 0, torch.zeros(TIMESTEP_RANGES)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        transformer.load_state_dict(state["transformer"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, typical = state["step"], state["typical"]

    def save():
        args.output.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step,
            "typical": typical,
            "transformer": transformer.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        temporary = state_file.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, state_file)
        ema.store(transformer.parameters())
        ema.copy_to(transformer.parameters())
        transformer.save_pretrained(args.output)
        ema.restore(transformer.parameters())

    progress = tqdm(total=args.steps, initial=step, mininterval=10, disable=not accelerator.is_main_process)
    mean_error, started = None, time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "metrics.jsonl").open("a") as metrics:
        while step < args.steps:
            seed = (args.seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index
            generator = torch.Generator().manual_seed(seed)
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * learning_rate_factor(step, 200, args.steps, args.decay_steps)
            batch = data.batch(args.batch_size, CAPTION_DROPOUT, generator)
            latents, text, mask = (tensor.to(accelerator.device) for tensor in batch)
            timesteps = draw_timesteps(args.batch_size, generator).to(accelerator.device)
            error = prediction_error(model, scheduler, latents, text, mask, timesteps, generator)
            loss = relative_error(error, timesteps, typical).mean() * LOSS_SCALE
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(transformer.parameters())
            step += 1
            mean = error.mean().item()
            mean_error = mean if mean_error is None else mean_error + 0.01 * (mean - mean_error)
            progress.update()
            if step % 50 == 0 and accelerator.is_main_process:
                progress.set_postfix(error=f"{mean_error:.4f}", norm=f"{norm:.2f}")
                record = {"step": step, "error": round(mean_error, 5), "seconds": round(time.time() - started)}
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
            if accelerator.is_main_process and (step % args.save_every == 0 or step == args.steps):
                save()


if __name__ == "__main__":
    main()
