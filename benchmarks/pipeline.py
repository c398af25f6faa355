"""
A picture from end to end: seconds of each stage (text, denoising, decoding) and the memory that it takes; or, with
`--caches`, what diffusers' caches save, at equal distance from the picture that is made without; or, with
`--step-cache`, what is saved by computing once per call what all steps share.

The pipeline is loaded as `localdit generate` loads it. `full_size.py` writes one of the full size. Memory is the
largest resident set of this process in each stage, pages of mapped files included; on a GPU (`--device cuda`) what
PyTorch holds there for tensors at most. The last line is JSON.
"""

import argparse
import ast
import contextlib
import io
import json
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from diffusers_localdit import LocalDiTPipeline
from diffusers_localdit.loading import PICTURE_DTYPES, default_dtype, load_pipeline
from diffusers_localdit.model_info import BUNDLED_NAME

STAGES = ["text", "denoising", "decoding"]
PROMPTS = ["a red circle on a white background", "a small blue square left of a large green triangle"]


def status(name: str) -> float:
    """A line of the kernel's report on this process, in gigabytes (10**9)."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


class Stages:
    """Seconds and peak memory of what runs in `with stages(name)`."""

    def __init__(self, clock: Callable[[], float], device: torch.device):
        self.clock, self.on_gpu, self.seconds, self.gigabytes = clock, device.type == "cuda", {}, {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.restart_peak()
        start = self.clock()
        yield
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds.setdefault(name, []).append(self.clock() - start)
        self.gigabytes[name] = max(self.gigabytes.get(name, 0), self.peak())

    def restart_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else status("VmHWM")


def draw_in_stages(pipe: DiffusionPipeline, args: argparse.Namespace, stages: Stages) -> None:
    """What a stage that is left out would have made is made up."""
    guided = args.guidance_scale > 1
    size = args.image_size or pipe.transformer.config.sample_size * pipe.vae_scale_factor
    channels, side = pipe.transformer.config.caption_channels, size // pipe.vae_scale_factor
    with args.device:
        embeddings = (torch.randn(1, 120, channels), torch.ones(1, 120)) * (1 + guided) + (None, None) * (not guided)
        latents = torch.randn(1, pipe.transformer.config.in_channels, side, side)
    if "text" in args.stages:
        with stages("text"):
            embeddings = pipe.encode_prompt(args.prompt, guided)
    if "denoising" in args.stages:
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        with stages("denoising"):
            latents = pipe(
                **dict(zip(names, embeddings)),
                height=size,
                width=size,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance_scale,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images
    if "decoding" in args.stages:
        with stages("decoding"):
            pipe.decode_latents(latents, size, size, "pil")


def measure_stages(args: argparse.Namespace) -> dict[str, Any]:
    stages = Stages(time.process_time if args.cpu_time else time.perf_counter, args.device)
    if args.memory is not None:
        room = round(args.memory * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    libraries = status("VmRSS")
    with stages("loading"):
        pipe = open_pipeline(args)
    for _ in range(args.runs):
        draw_in_stages(pipe, args, stages)
    for name, seconds in stages.seconds.items():
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"{name:10} {statistics.median(seconds):8.2f} s {spread:20} {stages.gigabytes[name]:6.2f} GB")
    most = max(stages.gigabytes.values())
    if stages.on_gpu:
        print(f"tensors on the GPU {most:.2f} GB at most")
    else:
        print(f"largest resident set {most:.2f} GB, {libraries:.2f} GB of it before loading")
    return {"seconds": stages.seconds, "gigabytes": stages.gigabytes, "libraries_gigabytes": libraries}


def open_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    settings = {"model": args.model, "dtype": args.dtype, "device": args.device, "vae_tile": args.vae_tile}
    pipe = load_pipeline(LocalDiTPipeline, settings, args.offload)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Caches


def cache_settings(pipe: DiffusionPipeline, steps: int, draw: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    """Of each kind of cache some settings, from careful to bold."""

    def timestep() -> int:
        return pipe.current_timestep

    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # the one way to get at the model's ratios
        draw()
    pipe.transformer.disable_cache()
    ratios = ast.literal_eval(re.search(r"^\[.*\]$", printed.getvalue().split("=...):")[1], re.MULTILINE)[0])
    return {
        "FirstBlockCache": {f"threshold {x}": FirstBlockCacheConfig(threshold=x) for x in (0.1, 0.12, 0.15, 0.2)},
        "MagCache": {
            f"threshold {x}": MagCacheConfig(threshold=x, num_inference_steps=steps, mag_ratios=ratios)
            for x in (0.01, 0.03, 0.06, 0.12)
        },
        "TaylorSeer": {
            f"interval {interval}, order {order}": TaylorSeerCacheConfig(
                cache_interval=interval, max_order=order, taylor_factors_dtype=torch.float32
            )
            for interval, order in ((2, 1), (2, 2), (3, 1), (3, 2))
        },
        "PyramidAttentionBroadcast": {
            f"self {own}, cross {cross}": PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=own,
                cross_attention_block_skip_range=cross,
                spatial_attention_block_identifiers=(r"transformer_blocks.*\.attn$",),
                cross_attention_block_identifiers=(r"transformer_blocks.*\.cross_attn$",),
                current_timestep_callback=timestep,
            )
            for own, cross in ((None, 2), (None, 4), (2, 2), (2, 4))
        },
        "FasterCache": {
            f"unconditional {skip}": FasterCacheConfig(
                unconditional_batch_skip_range=skip,
                spatial_attention_block_identifiers=(r"transformer_blocks.*\.attn$",),
                tensor_format="BCHW",
                current_timestep_callback=timestep,
            )
            for skip in (2, 5)
        },
    }


def open_without_noise(args: argparse.Namespace) -> DiffusionPipeline:
    """With the released LocalDiT's sampler: noise in every step, as of localdit-shapes, changes what caches reuse."""
    pipe = open_pipeline(args)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    return pipe


def measure_caches(args: argparse.Namespace) -> dict[str, Any]:
    clock = time.process_time if args.cpu_time else time.perf_counter
    pipe = open_without_noise(args)

    def draw() -> tuple[torch.Tensor, float]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
        start = clock()
        latents = pipe(
            PROMPTS,
            height=args.image_size,
            width=args.image_size,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=generators,
            output_type="latent",
        ).images.cpu()  # which waits for a GPU
        return latents, clock() - start

    def psnr(latents: torch.Tensor) -> float:
        """Of the worst picture, in dB; the peak is the range of the exact latents."""
        peak = exact.amax(dim=(1, 2, 3)) - exact.amin(dim=(1, 2, 3))
        return (10 * torch.log10(peak.square() / (latents - exact).square().mean(dim=(1, 2, 3)))).min().item()

    exact, _ = draw()
    rows = []
    for cache, configs in cache_settings(pipe, args.steps, draw).items():
        for setting, config in configs.items():
            row = {"cache": cache, "setting": setting}
            ratios = []
            try:
                for _ in range(args.runs):  # in turns with what is compared
                    _, plain_seconds = draw()
                    pipe.transformer.enable_cache(config)
                    latents, seconds = draw()
                    pipe.transformer.disable_cache()
                    ratios.append(plain_seconds / seconds)
                row |= {"times": statistics.median(ratios), "psnr": psnr(latents)}
                print(f"{cache:26} {setting:22} {row['times']:6.2f} times as fast {row['psnr']:7.1f} dB", flush=True)
            except Exception as error:  # whatever a cache raises at a model that it does not fit
                pipe = open_without_noise(args)
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{cache:26} {setting:22} {row['error']}", flush=True)
            rows.append(row)

    fit = [row for row in rows if row.get("psnr", 0) >= args.least_psnr]
    print(f"\nfastest of each kind with at least {args.least_psnr:g} dB")
    for cache in dict.fromkeys(row["cache"] for row in rows):
        best = max((row for row in fit if row["cache"] == cache), key=lambda row: row["times"], default=None)
        print(f"{cache:26} " + (f"{best['setting']:22} {best['times']:6.2f} times as fast" if best else "none"))
    return {"caches": rows}


# What all steps share


def measure_step_cache(args: argparse.Namespace) -> dict[str, Any]:
    clock = time.process_time if args.cpu_time else time.perf_counter
    pipe = open_pipeline(args)

    def denoise() -> float:
        stages = Stages(clock, args.device)
        draw_in_stages(pipe, args, stages)
        return stages.seconds["denoising"][0]

    denoise()
    ratios = []
    for _ in range(args.runs):
        with patch.object(pipe.transformer, "make_step_cache", return_value=None):
            without = denoise()
        ratios.append(without / denoise())
    spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
    print(f"denoising {statistics.median(ratios):.3f} times as fast {spread} with the step cache")
    return {"step_cache_times": ratios}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=BUNDLED_NAME, help="folder")
    parser.add_argument("--prompt", default=PROMPTS[0])
    parser.add_argument("--image-size", type=int, help="the model's if it is not given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=PICTURE_DTYPES, help="that of `localdit generate` if it is not given")
    parser.add_argument("--offload", choices=["none", "model", "group", "sequential", "disk"], default="none")
    parser.add_argument("--vae-tile", type=int)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--memory", type=float, metavar="GB", help="a limit that the process may not go beyond")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor, for a busy machine")
    parser.add_argument("--caches", action="store_true", help="compare caches")
    parser.add_argument("--step-cache", action="store_true", help="compare with and without it")
    parser.add_argument("--least-psnr", type=float, default=30.0, help="of the pictures made with a cache")
    args = parser.parse_args()
    args.dtype = args.dtype or default_dtype(args.device)

    measure = measure_caches if args.caches else measure_step_cache if args.step_cache else measure_stages
    report = measure(args)
    settings = vars(args) | {"device": str(args.device), "threads": torch.get_num_threads()}
    print(json.dumps(settings | report))


if __name__ == "__main__":
    main()
