"""
Training in float16, whose gradients a scaler keeps from vanishing. accelerate has it on GPUs only; here a CPU is given
the same scaler and autocast.
"""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from training_inputs import arguments, own_process_as_before, rows, weights, write_shard  # noqa: F401

from diffusers_localdit.training import engine
from diffusers_localdit.training.train import main

pytestmark = pytest.mark.usefixtures("own_process_as_before")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("data"))


@pytest.fixture
def scale_from(monkeypatch):
    """Lets a CPU train in float16, with the scale that is given first."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def use(scale: float, growth_interval: int = 2000) -> None:
        class ScalingAccelerator(Accelerator):
            def __init__(self, *arguments, **settings):
                super().__init__(*arguments, **settings)
                self.native_amp = True
                self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)

        monkeypatch.setattr(engine, "Accelerator", ScalingAccelerator)
        monkeypatch.setattr(engine, "check_precision_of_cpu", lambda settings: None)

    return use


def train(data: Path, output: Path, **changes) -> list[dict[str, float]]:
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before
    assert main(arguments(data, output, **changes), prog="train") == 0
    return rows(output)


def scale(output: Path, step: int) -> float:
    state = output / "checkpoints" / f"step_{step:08d}" / "state" / "scaler.pt"
    return torch.load(state, weights_only=True)["scale"]


def test_follows_float32(data, tmp_path, scale_from):
    expected = train(data, tmp_path / "float32")
    scale_from(2.0**10)
    actual = train(data, tmp_path / "float16", mixed_precision="fp16")
    for name in ("loss", "gradient_norm"):
        ours, theirs = ([row[name] for row in run] for run in (actual, expected))
        assert ours != theirs
        assert ours == pytest.approx(theirs, rel=5e-3)
    moved = weights(tmp_path / "float16", 8)
    assert all(x.dtype == torch.float32 for x in moved.values())


def test_steps_whose_gradients_overflow_are_left_out(data, tmp_path, scale_from):
    scale_from(2.0**30)
    changes = {
        "mixed_precision": "fp16",
        "steps": 16,
        "warmup_steps": 0,
        "checkpoint_every": 1,
        "keep_checkpoints": 16,
    }
    run = train(data, tmp_path / "run", **changes)
    finite = [math.isfinite(row["gradient_norm"]) for row in run]
    left_out = finite.index(True)
    assert 1 <= left_out < 16
    assert finite == [False] * left_out + [True] * (16 - left_out)
    assert all(math.isfinite(row["loss"]) for row in run)
    assert scale(tmp_path / "run", 16) == 2.0 ** (30 - left_out)
    before, after = (weights(tmp_path / "run", step) for step in (left_out, left_out + 1))
    start = weights(tmp_path / "run", 1)
    assert all(start[name].equal(before[name]) for name in start)
    assert not all(after[name].equal(before[name]) for name in after)


def test_goes_on_with_the_scale_that_it_had(data, tmp_path, scale_from, monkeypatch):
    scale_from(2.0**10, growth_interval=3)
    changes = {"mixed_precision": "fp16", "lr_schedule": "constant_with_warmup", "checkpoint_every": 4}
    train(data, tmp_path / "whole", **changes)
    train(data, tmp_path / "halves", **changes, steps=4)
    assert scale(tmp_path / "halves", 4) > 2.0**10
    train(data, tmp_path / "halves", **changes)
    assert scale(tmp_path / "halves", 8) == scale(tmp_path / "whole", 8)
    ours, theirs = weights(tmp_path / "halves", 8), weights(tmp_path / "whole", 8)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
