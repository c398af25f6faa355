"""
How the cost of a forward pass grows with the picture: every model at every size, all in turns in one process, so that
a machine that slows down slows all of them. Full width, random weights, float32, batch 1, on the CPU. A model
that gives other numbers than the plain computation is not timed.

Four times the pixels cost four times as much where all work is linear in them.
The last line is JSON.
"""

import argparse
import functools
import json
import statistics
import sys

import torch
from transformer import (
    LOCALDIT_LAYERS,
    ParityError,
    check_parity,
    forward_step,
    log,
    make_inputs,
    make_model,
    plain_model,
    runner,
    timed,
)

from diffusers_localdit.kernels.cpu_processor import why_not_cpu
from diffusers_localdit.packed_linear import why_not_packed

MODELS = [f"{kind}-{branch}" for kind in ("localdit", "packed", "cpu") for branch in ("global", "folded")]
CPU = torch.device("cpu")


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for each model and size: its seconds, and how many times as many as the first size's they are."""
    make = functools.partial(make_model, layers=args.layers, device=CPU, dtype=torch.float32)
    steps = {}
    for name in args.models:
        model = make(name)
        for side in args.sizes:
            log(f"{name}, {side} x {side}")
            inputs = make_inputs(side, side, 1, CPU, torch.float32)
            reference = make(plain_model(name)) if name.startswith(("packed", "cpu")) else model
            check_parity(name, model, reference, inputs, training=False)
            steps[name, side] = functools.partial(forward_step, runner(name, model, inputs))

    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for number in range(args.runs):
        log(f"round {number + 1} of {args.runs}")
        for key, step in steps.items():
            seconds[key].append(timed(step, args) * LOCALDIT_LAYERS / args.layers)
    return [
        {
            "model": name,
            "size": side,
            "seconds": own,
            "growth": [ours / first for ours, first in zip(own, seconds[name, args.sizes[0]])],
        }
        for (name, side), own in seconds.items()
    ]


def main(args: argparse.Namespace) -> None:
    rows = measure(args)
    print("| model | size | median s | times the first size: median (quartiles) |\n|---|---|---|---|")
    for row in rows:
        low, middle, high = statistics.quantiles(row["growth"], n=4)
        growth = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {row['model']} | {row['size']} | {statistics.median(row['seconds']):.3g} | {growth} |")
    print(json.dumps({"layers": args.layers, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:2])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048], help="sides of the pictures in pixels")
    parser.add_argument("--layers", type=int, default=1, help="layers to run; times are multiplied to all 18")
    parser.add_argument("--runs", type=int, default=15)
    parser.set_defaults(device=CPU, cpu_time=False)
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error("quartiles want at least 2 runs")
    kernels = any(name.startswith("cpu") for name in arguments.models)
    if kernels and (reason := why_not_cpu(CPU, torch.float32)):
        parser.error(reason)
    packed = any(name.startswith("packed") for name in arguments.models)
    if packed and (reason := why_not_packed(CPU, torch.float32)):
        parser.error(reason)
    try:
        main(arguments)
    except ParityError as error:
        sys.exit(str(error))
