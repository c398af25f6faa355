"""
Pictures per second of the loader alone, for each kind of data, and of training steps of the bundled model.

Pictures are JPEG files, a half larger than what is trained on. Nothing is timed until the first batch is there, and
steps take the same batch again and again. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_localdit import BUNDLED_MODEL, LocalDiTTransformer2DModel
from diffusers_localdit.training import TrainingDataset, open_source, training_loader
from diffusers_localdit.training.buckets import buckets
from diffusers_localdit.training.objective import diffusion_loss, training_scheduler
from diffusers_localdit.training.precompute import precompute
from diffusers_localdit.training.shards import write_shard

SPATIAL_SCALE = 8
STEP = 16  # of the sides of pictures: the VAE's factor times the patch size


def write_data(root: Path, pictures: int, image_size: int) -> dict[str, Path]:
    """The same pictures as a folder, as shards and precomputed."""
    folders = {name: root / name for name in ("folder", "shards", "precomputed")}
    folders["folder"].mkdir()
    folders["shards"].mkdir()
    random = np.random.default_rng(0)
    for number in range(pictures):
        colours = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folders["folder"] / f"{number:06}.jpg"
        colours.resize((image_size * 3 // 2,) * 2, Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text("two red circles and a small blue square on a grey background")
    files = sorted(folders["folder"].glob("*.jpg"))
    members = ((file.stem, {"jpg": file.read_bytes(), "txt": file.with_suffix(".txt").read_bytes()}) for file in files)
    write_shard(folders["shards"] / "shard-000000.tar", members)
    precompute(str(folders["folder"]), folders["precomputed"], image_size, num_workers=0)
    return folders


def open_dataset(root: Path, image_size: int, batch_size: int) -> TrainingDataset:
    return TrainingDataset(
        open_source(root),
        buckets(image_size, STEP, aspect_ratio_buckets=False),
        latent_channels=4,
        spatial_scale=SPATIAL_SCALE,
        num_train_timesteps=1000,
        seed=0,
        caption_dropout=0.1,
        global_batch_size=batch_size,
    )


def loader_rate(dataset: TrainingDataset, batches: int, num_workers: int, clock: Callable[[], float]) -> float:
    """Pictures per second."""
    loader = iter(training_loader(dataset, num_workers=num_workers))
    next(loader)
    start = clock()
    for _ in islice(loader, batches):
        pass
    return batches * dataset.global_batch_size / (clock() - start)


def step_rate(batch: dict, batches: int, clock: Callable[[], float]) -> float:
    """Pictures per second, on this machine's accelerator if it has one."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    transformer = LocalDiTTransformer2DModel.from_pretrained(BUNDLED_MODEL, subfolder="transformer").float().to(device)
    scheduler = training_scheduler()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-6)
    names = ("latents", "noise", "timesteps", "prompt_embeds", "prompt_attention_mask", "resolution", "aspect_ratio")
    inputs = [batch[name].to(device) for name in names]

    def step() -> float:
        loss = diffusion_loss(transformer, scheduler, *inputs).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step()
    start = clock()
    for _ in range(batches):
        step()
    return batches * len(inputs[0]) / (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20, help="that are timed")
    parser.add_argument("--workers", type=int, default=0, help="processes that read; with none this process does")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count this process' CPU time: for busy machines without GPU",
    )
    args = parser.parse_args()

    clock = time.process_time if args.cpu_time else time.perf_counter
    rates = {}
    with tempfile.TemporaryDirectory() as root:
        for name, folder in write_data(Path(root), args.pictures, args.image_size).items():
            dataset = open_dataset(folder, args.image_size, args.batch_size)
            rates[name] = loader_rate(dataset, args.batches, args.workers, clock)
        rates["step"] = step_rate(next(iter(training_loader(dataset))), args.batches, clock)
    for name, rate in rates.items():
        print(f"{name:12} {rate:9,.0f} pictures/s {rate / rates['step']:9,.1f} x the step")
    print(json.dumps(vars(args) | {name: round(rate, 1) for name, rate in rates.items()}))


if __name__ == "__main__":
    main()
