"""Trains the LocalDiT of localdit-shapes on the latents of `make_latents.py`. Run again to resume.

The objective is the original's: epsilon mean squared error at uniform timesteps, AdamW, caption dropout 0.1, EMA.
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
from torch import nn
from tqdm import tqdm

from diffusers_localdit import LocalDiTTransformer2DModel

CAPTION_DROPOUT = 0.1


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


def initialize_weights(transformer: LocalDiTTransformer2DModel) -> None:
    """PixArt's initialisation: Xavier linears; small normals for the embedders; blocks start without cross-attention."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedders = [transformer.adaln_single, transformer.caption_projection]
    for module in (module for embedder in embedders for module in embedder.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.xavier_uniform_(transformer.pos_embed.proj.weight.flatten(1))
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.cross_attn.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)


def learning_rate_factor(step: int, warmup: int, steps: int, decay: int) -> float:
    """Warm-up, plateau, linear decay to zero."""
    return max(min((step + 1) / warmup, 1.0, (steps - step) / decay), 0.0)


def diffusion_loss(transformer, scheduler, latents, text, mask, generator) -> torch.Tensor:
    """Mean squared error of the predicted noise (DDPM, epsilon) at uniform timesteps."""
    batch_size = len(latents)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
    pixels = float(latents.shape[-1] * 8)
    sample = transformer(
        scheduler.add_noise(latents, noise, timesteps),
        encoder_hidden_states=text,
        timestep=timesteps,
        added_cond_kwargs={
            "resolution": torch.full((batch_size, 2), pixels),
            "aspect_ratio": torch.ones(batch_size, 1),
        },
        encoder_attention_mask=mask,
    ).sample
    return F.mse_loss(sample, noise)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("out/shapes"), help="folder that make_latents.py wrote")
    parser.add_argument("--output", type=Path, default=Path("out/shapes/transformer"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--decay-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
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
    ema = EMAModel(transformer.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=3 / 4)
    # Not the sampler's own class: before `set_timesteps`, DPMSolver's `add_noise` takes timesteps from the wrong end.
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    transformer, optimizer = accelerator.prepare(transformer, optimizer)

    state_file = args.output / "training_state.pt"
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        transformer.load_state_dict(state["transformer"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    def save():
        args.output.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step,
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

    progress = tqdm(total=args.steps, initial=step, mininterval=10)
    mean_loss, started = None, time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "metrics.jsonl").open("a") as metrics:
        while step < args.steps:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * learning_rate_factor(step, 200, args.steps, args.decay_steps)
            latents, text, mask = data.batch(args.batch_size, CAPTION_DROPOUT, generator)
            loss = diffusion_loss(transformer, scheduler, latents, text, mask, generator)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(transformer.parameters())
            step += 1
            mean_loss = loss.item() if mean_loss is None else mean_loss + 0.01 * (loss.item() - mean_loss)
            progress.update()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{mean_loss:.4f}", norm=f"{norm:.2f}")
                record = {"step": step, "loss": round(mean_loss, 5), "seconds": round(time.time() - started)}
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
            if step % args.save_every == 0 or step == args.steps:
                save()


if __name__ == "__main__":
    main()
