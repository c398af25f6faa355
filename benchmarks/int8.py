"""
The transformer in int8 against itself in float32 on this CPU: seconds of a forward pass with random weights, and what
the rounding does to pictures of the bundled model.

Runs alternate in one process. Nothing is printed if the pictures do not reach `--least-psnr`. The last line is JSON.
"""

import argparse
import copy
import json
import statistics
import time

import torch
from transformer import make_inputs

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline, LocalDiTTransformer2DModel
from diffusers_localdit.precision import quantize_int8

PROMPTS = [
    "a red circle on a white background",
    "a small blue square left of a large green triangle on a grey background",
    "two yellow circles on a black background",
    "three green triangles on a white background",
]


def final_latents_psnr(seeds: int, guidance_scale: float) -> list[float]:
    """In dB for each seed and prompt, the peak being the range of the latents in float32."""
    pipe = LocalDiTPipeline.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    # The released LocalDiT's sampler: the noise of localdit-shapes' own leads pictures astray more easily.
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    pipe.set_progress_bar_config(disable=True)

    def draw(seed: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for _ in PROMPTS]
        return pipe(PROMPTS, guidance_scale=guidance_scale, generator=generators, output_type="latent").images

    expected = [draw(seed) for seed in range(seeds)]
    quantize_int8(pipe.transformer)
    return [
        (10 * torch.log10((reference.max() - reference.min()).square() / (latents - reference).square().mean())).item()
        for seed in range(seeds)
        for latents, reference in zip(draw(seed), expected[seed])
    ]


def forward_seconds(image_size: int, layers: int, global_context: bool, batch_size: int, runs: int, clock):
    """Seconds of each run in float32 and in int8."""
    torch.manual_seed(0)
    transformer = LocalDiTTransformer2DModel(num_layers=layers, use_global_context=global_context).eval()
    models = {"float32": transformer, "int8": quantize_int8(copy.deepcopy(transformer))}
    inputs = make_inputs(image_size, image_size, batch_size, torch.device("cpu"), torch.float32)
    del inputs["encoder_attention_mask"]  # texts of full length
    for model in models.values():  # not timed
        model(**inputs)
    seconds = {name: [] for name in models}
    for _ in range(runs):
        for name, model in models.items():
            start = clock()
            model(**inputs)
            seconds[name].append(clock() - start)
    return seconds


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--global-context", action="store_true", help="without it the folded model is timed")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of the processor, all threads together: for a busy machine"
    )
    parser.add_argument("--seeds", type=int, default=2, help="for each prompt; 0 leaves the pictures out")
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--least-psnr", type=float, default=35.0)
    args = parser.parse_args()

    psnr = final_latents_psnr(args.seeds, args.guidance_scale) if args.seeds else []
    if psnr and min(psnr) < args.least_psnr:
        parser.exit(1, f"final latents reach {min(psnr):.1f} dB only\n")
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = forward_seconds(args.image_size, args.layers, args.global_context, args.batch_size, args.runs, clock)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:8} {medians[name]:8.2f} s ({min(values):.2f} to {max(values):.2f})")
    ratios = [first / second for first, second in zip(seconds["float32"], seconds["int8"])]
    print(f"int8 is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    if psnr:
        print(f"final latents {statistics.median(psnr):.1f} dB ({min(psnr):.1f} to {max(psnr):.1f})")
    report = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    report |= {"seconds": seconds, "times": statistics.median(ratios), "psnr": psnr}
    print(json.dumps(vars(args) | report))


if __name__ == "__main__":
    main()
