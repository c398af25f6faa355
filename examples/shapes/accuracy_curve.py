"""Accuracy against training: judges the averaged weights of each checkpoint of a run; a table and a plot.

Checkpoints that are to be judged must have been kept: `localdit train ... --keep-checkpoints 100`.
"""

import argparse
from pathlib import Path

import torch
from compare_siblings import accuracies, row
from matplotlib.figure import Figure
from scenes import KINDS

from diffusers_localdit.training.checkpoints import checkpoints, read_manifest
from diffusers_localdit.training.models import read_transformer


def plot_accuracies(steps: list[int], shares: list[list[float]], path: Path) -> None:
    """`shares` has a row for each step, percentages for each kind and all."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for label, column in zip((*KINDS, "overall"), zip(*shares)):
        axes.plot(steps, column, marker="o", label=label, **({"color": "black"} if label == "overall" else {}))
    axes.set(xlabel="step", ylabel="right on held-out captions, %", ylim=(0, 100))
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output of `localdit train`")
    parser.add_argument("--every", type=int, default=1000, help="steps between those to judge; default: 1000")
    parser.add_argument("--plot", type=Path, default=Path("docs/accuracy.png"), help="default: docs/accuracy.png")
    parser.add_argument("--pictures", type=int, default=64, help="per kind and checkpoint; default: 64")
    args = parser.parse_args(argv)

    torch.set_flush_denormal(True)
    found = {read_manifest(checkpoint)["step"]: checkpoint for checkpoint in checkpoints(args.run / "checkpoints")}
    steps = [step for step in sorted(found) if step % args.every == 0 or step == max(found)]
    if not steps:
        parser.error(f"there are no checkpoints in {args.run}")
    print(row("step", *KINDS, "overall"))
    print(row(*["---"] * (2 + len(KINDS))))
    shares = []
    for step in steps:
        shares.append(accuracies(read_transformer(str(found[step])).eval(), args.pictures))
        print(row(f"{step:,}", *shares[-1]), flush=True)
    plot_accuracies(steps, shares, args.plot)


if __name__ == "__main__":
    main()
