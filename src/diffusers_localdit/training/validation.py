"""What a run shows of itself: metrics, the loss on fixed noise, pictures of fixed prompts, a plot of the loss."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.utils import make_image_grid
from torch import nn

from ..checkpoint_io import CheckpointError, written_whole
from ..pipeline_localdit import LocalDiTPipeline
from .conditioning import Conditioning
from .dataset import TrainingDataset, collate
from .objective import diffusion_loss

TIMESTEPS = range(50, 1000, 100)
SAMPLING_STEPS = 20
POINTS = 200  # of the plot


class Metrics:
    """
    `metrics.jsonl`: one row for each step, and nothing in it that depends on when or where it was computed.

    Args:
        path (`Path`): The file.
        step (`int`): Steps that have been made. Rows of later steps, of a run that was killed, are removed.
    """

    def __init__(self, path: Path, step: int):
        kept = path.read_bytes().splitlines(keepends=True)[:step] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        shorter = path.with_name(f".{path.name}.new")
        shorter.write_bytes(b"".join(kept))
        os.replace(shorter, path)  # at no moment is there no file: what it says cannot be computed again
        self.path = path
        self.file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Have the rows on the disk before a checkpoint says that they are."""
        os.fsync(self.file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator,
    model: nn.Module,
    scheduler: DDPMScheduler,
    conditioning: Conditioning,
    dataset: TrainingDataset,
    samples: int,
) -> float:
    """
    The loss on the first samples of a data set, each with the same noise at the same ten timesteps every time.
    Unweighted. It does not depend on the number of processes, among which the samples are divided.

    Returns:
        `float`: The mean, in every process.
    """
    timesteps = torch.tensor(TIMESTEPS, device=accelerator.device)
    count = len(timesteps)
    sums = torch.zeros(samples, dtype=torch.float64, device=accelerator.device)
    usable = torch.zeros_like(sums)
    ranks = accelerator.num_processes
    for place in range(accelerator.process_index, -(-samples // ranks) * ranks, ranks):
        batch = collate([dataset[0, place % samples]])  # sharded models need as many forward passes in each process
        latents, embeds, mask = conditioning(batch)
        resolution, aspect_ratio, noise = (
            batch[name].to(accelerator.device).expand(count, *batch[name].shape[1:])
            for name in ("resolution", "aspect_ratio", "noise")
        )
        losses = diffusion_loss(
            model,
            scheduler,
            latents.expand(count, -1, -1, -1),
            noise,
            timesteps,
            embeds.expand(count, -1, -1),
            mask.expand(count, -1),
            resolution,
            aspect_ratio,
        )
        if place < samples and batch["weight"].item():
            sums[place], usable[place] = losses.double().mean(), 1
    sums, usable = accelerator.reduce(sums), accelerator.reduce(usable)
    return (sums.sum() / usable.sum()).item()


def save_pictures(
    accelerator: Accelerator, model: nn.Module, conditioning: Conditioning, side: int, path: Path
) -> None:
    """A row of pictures of the run's prompts, from the same noise every time. To be called by all processes."""
    pipe = LocalDiTPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=conditioning.sampler.vae,
        transformer=accelerator.unwrap_model(model),
        scheduler=conditioning.sampler.scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for seed, embeds in enumerate(conditioning.prompt_embeds):
        prompt_embeds, prompt_attention_mask = conditioning.padded(embeds[None])
        negative_prompt_embeds, negative_prompt_attention_mask = conditioning.padded(
            conditioning.empty[None], length=prompt_embeds.shape[1]
        )
        pictures += pipe(
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            height=side,
            width=side,
            num_inference_steps=SAMPLING_STEPS,
            generator=torch.Generator().manual_seed(seed),
        ).images
    if accelerator.is_main_process:
        with written_whole(path, overwrite=True) as unfinished:
            make_image_grid(pictures, rows=1, cols=len(pictures)).save(unfinished)


def check_plots() -> None:
    """Raises `ValueError` where `save_plot` would fail for want of a library."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the plot of the loss needs matplotlib: pip install 'diffusers-localdit[train]'")


def save_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The training loss, averaged to some two hundred points, and the validation loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    width = -(-len(rows) // POINTS)
    means = [rows[start : start + width] for start in range(0, len(rows), width)]
    axes.plot(
        [part[-1]["step"] for part in means],
        [sum(row["loss"] for row in part) / len(part) for part in means],
        label=f"training, mean of {width} step{'s' * (width > 1)}",
    )
    validated = [row for row in rows if "validation_loss" in row]
    if validated:
        axes.plot(
            [row["step"] for row in validated],
            [row["validation_loss"] for row in validated],
            label="validation, fixed noise and timesteps",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    with written_whole(path, overwrite=True) as unfinished:
        figure.savefig(unfinished, dpi=120, metadata={"Software": None})
