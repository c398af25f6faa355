"""Two processes (gloo, CPU) against one: the same samples, the same numbers, checkpoints that either can load."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_inputs import ENVIRONMENT, Training, arguments, rows, run_processes, weights, write_shard

from diffusers_localdit import LocalDiTTransformer2DModel

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LocalDiTTransformerBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
STEPS = 20
SETTINGS = {"steps": STEPS, "validate_every": 10, "checkpoint_every": 10}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    Training(data, output, batch_size=4, **SETTINGS).finish()
    return output


def assert_follows(output: Path, reference: Path) -> None:
    """Losses within 1e-5 at each step. The sums over processes are in another order, hence not to the bit."""
    ours, theirs = rows(output), rows(reference)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for key in ("loss", "gradient_norm", "learning_rate", "validation_loss"):
        for mine, other in zip(ours, theirs):
            assert mine.get(key) == pytest.approx(other.get(key), abs=1e-5), (key, mine["step"])


def test_two_processes_follow_one(data, one_process, tmp_path):
    for process in run_processes(data, tmp_path / "run", count=2, batch_size=2, **SETTINGS):
        process.finish()
    assert_follows(tmp_path / "run", one_process)


def test_run_goes_on_with_another_number_of_processes(data, one_process, tmp_path):
    output = tmp_path / "run"
    for process in run_processes(data, output, count=2, batch_size=2, **(SETTINGS | {"steps": 10})):
        process.finish()
    assert "started with batches of 4 samples" in Training(data, output, batch_size=2, **SETTINGS).error()
    Training(data, output, batch_size=4, **SETTINGS).finish()
    assert_follows(output, one_process)


def test_sharded_run_follows_resumes_and_saves_what_one_process_loads(data, one_process, tmp_path):
    output = tmp_path / "run"
    for steps in (10, STEPS):  # the second part from the checkpoint of the first
        settings = SETTINGS | {"steps": steps}
        for process in run_processes(data, output, count=2, batch_size=2, env=FSDP2, **settings):
            process.finish()
    assert_follows(output, one_process)

    checkpoint = output / "checkpoints" / f"step_{STEPS:08d}"
    assert len(list(checkpoint.glob("state/optimizer_0/*.distcp"))) == 2  # it was sharded indeed
    plain, average = (
        LocalDiTTransformer2DModel.from_pretrained(checkpoint, subfolder="transformer", variant=variant)
        for variant in (None, "ema")
    )
    assert plain.state_dict().keys() == average.state_dict().keys()
    assert not plain.proj_out.weight.equal(average.proj_out.weight)

    # One process that starts from there has these weights, and the validation loss that the two had.
    Training(data, tmp_path / "alone", init_from=output, learning_rate=0, steps=1).finish()
    started = weights(tmp_path / "alone", 1)
    assert all(started[name].equal(tensor) for name, tensor in average.state_dict().items())
    validated = rows(output)[-1]["validation_loss"]
    assert rows(tmp_path / "alone")[0]["validation_loss"] == pytest.approx(validated, rel=1e-6)


@pytest.mark.slow
def test_launcher_with_the_configuration_in_the_repository(data, one_process, tmp_path):
    """`accelerate launch` as the documentation has it."""
    root = Path(__file__).parents[1]
    output = tmp_path / "run"
    command = [Path(sys.executable).with_name("accelerate"), "launch"]
    command += ["--config_file", root / "examples/accelerate/fsdp2.yaml", "--num_processes", "2"]
    command += [root / "examples/train.py", *arguments(data, output, **(SETTINGS | {"batch_size": 2}))]
    done = subprocess.run([str(word) for word in command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(output.glob("checkpoints/*/state/optimizer_0/*.distcp"))
    assert_follows(output, one_process)
