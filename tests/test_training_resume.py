"""A run that was stopped, in whatever way, ends as if it had not been."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from training_inputs import Training, assert_same_run, rows, weights, write_shard

STEPS = 30
SETTINGS = {"steps": STEPS, "checkpoint_every": 3, "validate_every": 7, "num_workers": 1, "lr_schedule": "cosine"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    output = tmp_path_factory.mktemp("reference") / "run"
    Training(data, output, **SETTINGS).finish()
    return output


def wait_for(condition, process: Training) -> bool:
    while process.is_alive():
        if condition():
            return True
        time.sleep(0.001)
    return False


def count_rows(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill_at_random(data: Path, output: Path, kills: int) -> int:
    """
    Starts the same run again and again and kills it: in turn while it writes a checkpoint, and a random while after it
    made a random number of steps. Returns how many kills hit a running process.
    """
    draw, hits = random.Random(0), 0
    for kill in range(kills):
        process = Training(data, output, **SETTINGS)
        start = count_rows(output)
        if kill % 2 == 0:
            wait_for(lambda: any((output / "checkpoints").glob(".step_*.unfinished")), process)
        else:
            goal = start + draw.randrange(STEPS // kills + 1)
            wait_for(lambda goal=goal: count_rows(output) >= goal, process)
            time.sleep(draw.uniform(0, 0.1))
        if process.is_alive():
            hits += 1
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    Training(data, output, **SETTINGS).finish()
    return hits


def test_killed_run_ends_as_the_uninterrupted_one(data, reference, tmp_path):
    assert kill_at_random(data, tmp_path / "run", kills=3) == 3
    assert_same_run(tmp_path / "run", reference, STEPS)


@pytest.mark.slow
def test_run_killed_ten_times_ends_as_the_uninterrupted_one(data, reference, tmp_path):
    assert kill_at_random(data, tmp_path / "run", kills=10) >= 8
    assert_same_run(tmp_path / "run", reference, STEPS)


def test_sigterm_saves_and_exits_without_error(data, reference, tmp_path):
    output = tmp_path / "run"
    process = Training(data, output, **(SETTINGS | {"checkpoint_every": 1000}))
    assert wait_for(lambda: count_rows(output) >= 4, process)
    process.terminate()
    said = process.finish(code=0)
    step = len(rows(output))
    assert 4 <= step < STEPS and f"stopped after step {step}" in said
    assert weights(output, step)
    Training(data, output, **(SETTINGS | {"checkpoint_every": 1000})).finish()
    assert_same_run(output, reference, STEPS)


def test_sigterm_to_all_processes_saves(data, reference, tmp_path):
    """As schedulers send it, to those that read data too."""
    output = tmp_path / "run"
    process = Training(data, output, **(SETTINGS | {"checkpoint_every": 1000, "num_workers": 2}))
    assert wait_for(lambda: count_rows(output) >= 4, process)
    readers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(readers) == 2
    for pid in (*map(int, readers), process.pid):
        os.kill(pid, signal.SIGTERM)
    assert "stopped after step" in process.finish(code=0)
    Training(data, output, **(SETTINGS | {"checkpoint_every": 1000})).finish()
    assert_same_run(output, reference, STEPS)


def test_finished_run_is_left_alone(data, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    assert f"all {STEPS} steps are done" in Training(data, reference, **SETTINGS).finish()
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before


def test_other_settings_do_not_resume(data, reference):
    message = Training(data, reference, **(SETTINGS | {"steps": STEPS + 1, "learning_rate": 1})).error()
    assert "learning_rate: 0.001, but now it is 1.0" in message


def test_number_of_workers_changes_nothing(data, tmp_path):
    settings = {"steps": 4, "warmup_steps": 0}
    Training(data, tmp_path / "none", num_workers=0, **settings).finish()
    Training(data, tmp_path / "two", num_workers=2, **settings).finish()
    assert_same_run(tmp_path / "two", tmp_path / "none", 4)


def test_row_of_metrics_for_each_step(reference):
    steps = rows(reference)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert [row["step"] for row in steps if "validation_loss" in row] == [7, 14, 21, 28, 30]
    assert steps[0]["learning_rate"] == 0 and steps[3]["learning_rate"] == 1e-3 > steps[4]["learning_rate"]


def test_only_the_newest_checkpoints_are_kept(reference):
    assert sorted(path.name for path in (reference / "checkpoints").iterdir()) == ["step_00000027", "step_00000030"]
