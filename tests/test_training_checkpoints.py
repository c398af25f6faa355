"""What counts as a checkpoint, which are kept, and files that a killed run left."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from matplotlib.axes import Axes
from torch import nn

from diffusers_localdit.checkpoint_io import CheckpointError
from diffusers_localdit.training import checkpoints as module
from diffusers_localdit.training.checkpoints import averaged, checkpoints, latest_checkpoint
from diffusers_localdit.training.validation import Metrics, save_plot


def make_checkpoint(folder: Path, name: str, complete: bool = True) -> Path:
    (folder / name / "transformer").mkdir(parents=True)
    (folder / name / "transformer" / "weights").write_text("numbers")
    if complete:
        (folder / name / module.MANIFEST).write_text("{}")
    return folder / name


def test_only_complete_checkpoints_count(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    good = make_checkpoint(tmp_path, "step_00000010")
    make_checkpoint(tmp_path, "step_00000011", complete=False)  # as a copy that was broken off
    make_checkpoint(tmp_path, ".step_00000012.unfinished")
    make_checkpoint(tmp_path, ".step_00000013.old")
    make_checkpoint(tmp_path, "step_00000014.bak")
    make_checkpoint(tmp_path, "step_15")
    assert latest_checkpoint(tmp_path) == good
    assert checkpoints(tmp_path) == [good]


def test_order_is_that_of_numbers(tmp_path):
    names = ["step_99999999", "step_100000000", "step_00000002"]
    found = [path.name for path in checkpoints(make_checkpoint(tmp_path, names[0]).parent)]
    assert found == names[:1]
    for name in names[1:]:
        make_checkpoint(tmp_path, name)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_99999999", "step_100000000"]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def save(folder: Path, step: int, accelerator: Accelerator, monkeypatch, keep: int = 2, fail_in: str | None = None):
    """A checkpoint whose parts are small files. `fail_in` names the part at which the disk is full."""

    def part(name: str):
        def write(unfinished, *_, variant: str = "") -> None:
            if fail_in == name + variant:
                raise OSError(28, "No space left on device")
            Path(unfinished, name + variant).write_text("numbers")

        return write

    model = nn.Linear(2, 2)
    monkeypatch.setattr(accelerator, "save_state", lambda path: part("state")(Path(path).parent))
    monkeypatch.setattr(module, "save_weights", part("weights"))
    ema = EMAModel(model.parameters())
    return module.save_checkpoint(folder, step, accelerator, model, ema, {"note": "mine"}, keep)


def test_newest_are_kept_and_leftovers_removed(tmp_path, accelerator, monkeypatch):
    make_checkpoint(tmp_path, "step_00000004", complete=False)  # in whose place the whole one comes
    for step in range(1, 5):
        make_checkpoint(tmp_path, f".step_{step + 100:08d}.unfinished")
        assert save(tmp_path, step, accelerator, monkeypatch) == tmp_path / f"step_{step:08d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    assert not (tmp_path / "step_00000004" / "transformer").exists()
    assert json.loads((tmp_path / "step_00000004" / module.MANIFEST).read_text()) == {"step": 4, "note": "mine"}


@pytest.mark.parametrize("part", ["state", "weights", "weightsema"])
def test_full_disk_at_any_part_leaves_the_earlier_ones(part, tmp_path, accelerator, monkeypatch):
    save(tmp_path, 1, accelerator, monkeypatch)
    with pytest.raises(CheckpointError, match=r"step 2 to .*No space left on device.*last good .*step_00000001"):
        save(tmp_path, 2, accelerator, monkeypatch, keep=1, fail_in=part)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_full_disk_before_there_is_any(tmp_path, accelerator, monkeypatch):
    with pytest.raises(CheckpointError, match="; there is no earlier one; make room"):
        save(tmp_path, 1, accelerator, monkeypatch, fail_in="state")


def test_what_can_be_done_about_a_damaged_one(tmp_path):
    """As in a real run's test, but with every place in the row."""
    steps = [make_checkpoint(tmp_path, f"step_{step:08d}") for step in (1, 2, 3)]
    for checkpoint, todo in zip(steps, ("start anew", f"go on from {steps[0]}", f"go on from {steps[1]}")):
        message = f"{checkpoint} cannot be read .*; if it is damaged, remove it to {todo}"
        with pytest.raises(CheckpointError, match=message), module.complete(checkpoint):
            raise EOFError("Ran out of input")
    with pytest.raises(CheckpointError, match="remove it to start anew"), module.complete(tmp_path / "copied"):
        raise RuntimeError("PytorchStreamReader failed reading zip archive")
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), module.complete(steps[0]):
        raise RuntimeError("shapes differ")


def test_faults_of_ours_are_not_taken_for_a_full_disk(tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(accelerator, "save_state", lambda path: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent"):
        module.save_checkpoint(tmp_path, 1, accelerator, nn.Linear(2, 2), None, {}, 1)


def test_weights_come_back_after_the_average_was_used():
    model = nn.Linear(3, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema = EMAModel(model.parameters())
    ema.shadow_params = [torch.zeros_like(parameter) for parameter in ema.shadow_params]
    with pytest.raises(KeyboardInterrupt), averaged(model, ema):
        assert not model.weight.any()
        raise KeyboardInterrupt
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


class TestMetrics:
    def test_rows_after_the_checkpoint_are_cut(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        metrics = Metrics(path, step=0)
        for step in range(1, 6):
            metrics.write({"step": step, "loss": 0.1 * step})
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"step": 6, "lo')  # killed while it wrote
        assert [row["step"] for row in Metrics(path, step=3).rows()] == [1, 2, 3]
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])

    def test_a_new_run_starts_empty(self, tmp_path):
        path = tmp_path / "out" / "metrics.jsonl"
        Metrics(path, step=0).write({"step": 1})
        assert Metrics(path, step=0).rows() == []

    def test_plot_of_the_same_rows_is_the_same(self, tmp_path):
        rows = [{"step": step, "loss": 1 / step} for step in range(1, 1000)]
        rows[-1]["validation_loss"] = 0.5
        save_plot(rows, tmp_path / "a.png")
        save_plot(rows, tmp_path / "b.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    @pytest.mark.parametrize("count", [200, 999])
    def test_plot_shows_means_and_the_validation_loss(self, count, tmp_path, monkeypatch):
        lines = {}

        def plot(axes, steps, losses, label):
            lines[label] = dict(zip(steps, losses, strict=True))
            return drawn(axes, steps, losses, label=label)

        drawn = Axes.plot
        monkeypatch.setattr(Axes, "plot", plot)
        rows = [{"step": step, "loss": 1 / step} for step in range(1, count + 1)]
        rows[3]["validation_loss"] = 0.5
        save_plot(rows, tmp_path / "loss.png")
        width = -(-count // 200)
        name = {1: "training, mean of 1 step", 5: "training, mean of 5 steps"}[width]
        training = lines.pop(name)
        (validation,) = lines.values()
        assert validation == {4: 0.5}
        assert len(training) == 200 and list(training)[-1] == count
        assert training[width] == pytest.approx(sum(1 / step for step in range(1, width + 1)) / width)

    def test_full_disk_is_said_with_the_file(self, tmp_path):
        metrics = Metrics(tmp_path / "metrics.jsonl", step=0)
        refusal = pytest.raises(CheckpointError, match=r"cannot write .*metrics.jsonl: No space left on device")
        with suppress(OSError), Path("/dev/full").open("a") as metrics.file, refusal:  # closing it fails once more
            metrics.write({"step": 1})
