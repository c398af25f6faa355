"""Compares the runs of `siblings.py`: tables of validation losses and accuracies, and a plot of the losses.

RUNS is a folder of runs named as the siblings; those that are not there are left out. Of `frozen_branch` there is a
second table: the trained model as the original would have saved it, without its branch, and what each policy of
`localdit convert --global-context` makes of that file.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from evaluate import judged_pictures
from matplotlib.figure import Figure
from scenes import KINDS
from siblings import BRANCH_SEED, SIBLINGS

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline, LocalDiTTransformer2DModel
from diffusers_localdit.state_dict_conversion import convert_state_dict, original_state_dict
from diffusers_localdit.training.checkpoints import latest_checkpoint, read_manifest
from diffusers_localdit.training.conditioning import Conditioning
from diffusers_localdit.training.models import read_transformer
from diffusers_localdit.training.objective import training_scheduler
from diffusers_localdit.training.settings import TrainingSettings
from diffusers_localdit.training.sources import open_source
from diffusers_localdit.training.train import build_validation_dataset
from diffusers_localdit.training.validation import validation_loss

POLICIES = {
    f"the same branch (seed {BRANCH_SEED})": f"seed:{BRANCH_SEED}",
    **{f"another branch (seed {seed})": f"seed:{seed}" for seed in (1, 2, 3)},
    "folded": "fold",
    "without the branch": "none",
}


def validation_curve(run: Path) -> tuple[list[int], list[float]]:
    """Steps and validation losses of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    return [step for step, _ in validated], [loss for _, loss in validated]


def plot_losses(runs: dict[str, Path], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        axes.plot(*validation_curve(run), label=SIBLINGS[name].title)
    axes.set(xlabel="step", ylabel="validation loss, fixed noise and timesteps", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def loss_of(transformer: LocalDiTTransformer2DModel, run: Path) -> float:
    """The validation loss that the run itself would find with these weights."""
    settings = TrainingSettings(**read_manifest(latest_checkpoint(run / "checkpoints"))["settings"])
    source = open_source(settings.data_root)
    accelerator = Accelerator(cpu=True)
    prompts = run / "prompts.safetensors"
    conditioning = Conditioning(
        settings.pipeline, settings.data_root, source.precomputed, [], prompts, accelerator.device
    )
    dataset = build_validation_dataset(settings, source)
    samples = settings.validation_samples
    return validation_loss(accelerator, transformer, training_scheduler(), conditioning, dataset, samples)


def accuracies(transformer: LocalDiTTransformer2DModel, pictures: int) -> list[float]:
    """Percentages of right pictures, for each kind and all."""
    pipeline = LocalDiTPipeline.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    pipeline.transformer = transformer
    right = {kind: [] for kind in KINDS}
    drawn = judged_pictures(pipeline, pictures, steps=20, guidance_scale=1.5, batch_size=32, seed=0)
    for kind, _, _, verdict in drawn:
        right[kind].append(verdict.right)
    shares = [100 * np.mean(group) for group in right.values()]
    return [*shares, np.mean(shares)]


def converted(transformer: LocalDiTTransformer2DModel, policy: str) -> LocalDiTTransformer2DModel:
    """What conversion makes of the file that the original would have saved: no parameters of its processors."""
    saved = original_state_dict(transformer.state_dict())
    saved = {name: tensor for name, tensor in saved.items() if ".processor." not in name}
    sizes = {"window_size": transformer.config.window_size, "sample_size": transformer.config.sample_size}
    state_dict, config, _ = convert_state_dict(saved, **sizes, global_context=policy)
    model = LocalDiTTransformer2DModel(**config)
    model.load_state_dict(state_dict)
    return model.eval()


def row(*cells: str | float) -> str:
    return "| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.1f}%" for cell in cells) + " |"


def sibling_rows(runs: dict[str, Path], pictures: int) -> Iterator[str]:
    yield row("model", "parameters", "step", "validation loss", *KINDS, "overall")
    yield row(*["---"] * (5 + len(KINDS)))
    for name, run in runs.items():
        transformer = read_transformer(str(run)).eval()
        SIBLINGS[name].prepare(transformer)
        steps, losses = validation_curve(run)
        numbers = (f"{transformer.num_parameters():,}", f"{steps[-1]:,}", f"{losses[-1]:.5f}")
        yield row(SIBLINGS[name].title, *numbers, *accuracies(transformer, pictures))


def policy_rows(run: Path, pictures: int) -> Iterator[str]:
    yield row("frozen branch, evaluated with", "`--global-context`", "validation loss", *KINDS, "overall")
    yield row(*["---"] * (4 + len(KINDS)))
    trained = read_transformer(str(run))
    for title, policy in POLICIES.items():
        transformer = converted(trained, policy)
        yield row(title, f"`{policy}`", f"{loss_of(transformer, run):.5f}", *accuracies(transformer, pictures))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--plot", type=Path, default=Path("docs/siblings.png"), help="default: docs/siblings.png")
    parser.add_argument("--pictures", type=int, default=256, help="per kind and model; default: 256")
    args = parser.parse_args(argv)

    torch.set_flush_denormal(True)
    runs = {name: args.runs / name for name in SIBLINGS if (args.runs / name / "metrics.jsonl").exists()}
    plot_losses(runs, args.plot)
    for line in sibling_rows(runs, args.pictures):
        print(line, flush=True)
    if "frozen_branch" in runs:
        print()
        for line in policy_rows(runs["frozen_branch"], args.pictures):
            print(line, flush=True)


if __name__ == "__main__":
    main()
