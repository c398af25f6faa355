"""Two processes (gloo, CPU) against one: the same samples, the same numbers, checkpoints that either can load."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
import torch
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
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_CPU": "false",  # with which accelerate would pass over DeepSpeed
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "DS_ACCELERATOR": "cpu",
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed (pip install deepspeed)")
ENGINES = {  # the environment, and the pieces of the optimizer's state
    "fsdp2": (FSDP2, "optimizer_0/*.distcp"),
    "deepspeed": (DEEPSPEED, "pytorch_model/zero_pp_rank_*_optim_states.pt"),
}
engines = pytest.mark.parametrize("engine", ["fsdp2", pytest.param("deepspeed", marks=needs_deepspeed)])
STEPS = 20
SETTINGS = {"steps": STEPS, "validate_every": 5, "checkpoint_every": 10}  # steps follow both


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


@engines
def test_sharded_run_follows_resumes_and_saves_what_one_process_loads(engine, data, one_process, tmp_path):
    output = tmp_path / "run"
    env, pieces = ENGINES[engine]
    for steps in (10, STEPS):  # the second part from the checkpoint of the first
        settings = SETTINGS | {"steps": steps}
        for process in run_processes(data, output, count=2, batch_size=2, env=env, **settings):
            process.finish()
    assert_follows(output, one_process)

    checkpoint = output / "checkpoints" / f"step_{STEPS:08d}"
    assert len(list(checkpoint.glob(f"state/{pieces}"))) == 2  # it was sharded indeed
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


@engines
def test_optimizer_in_pieces_is_not_taken_for_a_whole_one(engine, data, tmp_path):
    """DeepSpeed, for one, would begin with a new optimizer and not say so."""
    output = tmp_path / "run"
    env, _ = ENGINES[engine]
    Training(data, output, batch_size=4, **(SETTINGS | {"steps": 10})).finish()
    for process in run_processes(data, output, count=2, batch_size=2, env=env, **SETTINGS):
        message = process.error()
        assert "with the optimizer's state in one piece, but now it is divided by" in message
        assert f"--init-from {output}" in message


@needs_deepspeed
class TestDeepSpeed:
    def test_gradients_are_accumulated(self, data, tmp_path):
        settings = {"gradient_accumulation_steps": 2, "steps": STEPS, "validate_every": 5}
        Training(data, tmp_path / "one", batch_size=4, **settings).finish()
        for process in run_processes(data, tmp_path / "two", count=2, batch_size=2, env=DEEPSPEED, **settings):
            process.finish()
        assert_follows(tmp_path / "two", tmp_path / "one")

    def test_bfloat16_is_computed_in_and_not_kept_in(self, data, tmp_path):
        """DeepSpeed's own configuration has no say in it, nor in the batch or the clipping."""
        config = tmp_path / "deepspeed.json"
        other = {"bf16": {"enabled": True}, "gradient_clipping": 1e-3, "train_micro_batch_size_per_gpu": 7}
        config.write_text(json.dumps(other | {"zero_optimization": {"stage": 1}}))
        env = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
        del env["ACCELERATE_DEEPSPEED_ZERO_STAGE"]  # which accelerate does not want beside a file
        settings = {
            "steps": 8,
            "batch_size": 4,
            "mixed_precision": "bf16",
            "learning_rate": 1e-4,
            "max_grad_norm": 0.8,
        }
        Training(data, tmp_path / "plain", **settings).finish()
        (process,) = run_processes(data, tmp_path / "run", count=1, env=env, **settings)
        process.finish()
        for variant in ("", ".ema"):
            tensors = weights(tmp_path / "run", 8, variant)
            assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
            assert not all(tensor.bfloat16().float().equal(tensor) for tensor in tensors.values())
        Training(data, tmp_path / "exact", **(settings | {"mixed_precision": "no"})).finish()
        norms = {name: [row["gradient_norm"] for row in rows(tmp_path / name)] for name in ("run", "plain", "exact")}
        assert norms["run"] == pytest.approx(norms["plain"], rel=1e-5)
        assert norms["run"] != pytest.approx(norms["exact"], rel=1e-5)

    def test_gradients_without_a_limit(self, data, tmp_path):
        settings = SETTINGS | {"batch_size": 4, "max_grad_norm": "none"}
        Training(data, tmp_path / "plain", **settings).finish()
        (process,) = run_processes(data, tmp_path / "run", count=1, env=DEEPSPEED, **settings)
        process.finish()
        assert_follows(tmp_path / "run", tmp_path / "plain")

    def test_divided_weights_are_refused(self, data, tmp_path):
        env = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
        (process,) = run_processes(data, tmp_path / "run", count=1, env=env)
        assert "ZeRO stage 3 is not supported: take stage 1 or 2, or FSDP" in process.error()

    def test_number_of_processes_must_stay(self, data, tmp_path):
        output = tmp_path / "run"
        for process in run_processes(data, output, count=2, batch_size=2, env=DEEPSPEED, steps=2):
            process.finish()
        (process,) = run_processes(data, output, count=1, batch_size=4, env=DEEPSPEED, steps=4)
        assert "divided by DeepSpeed among 2 processes, but now it is divided by DeepSpeed among 1" in process.error()


@pytest.mark.slow
@engines
def test_launcher_with_the_configuration_in_the_repository(engine, data, one_process, tmp_path):
    """`accelerate launch` as the documentation has it."""
    if engine == "deepspeed" and which("g++") is None:
        pytest.skip("there is no g++, with which DeepSpeed compiles a part of itself")
    root = Path(__file__).parents[1]
    output = tmp_path / "run"
    env, pieces = ENGINES[engine]
    env = ENVIRONMENT | {name: env[name] for name in ("ACCELERATE_USE_CPU", "DS_ACCELERATOR") if name in env}
    command = [Path(sys.executable).with_name("accelerate"), "launch"]
    command += ["--config_file", root / f"examples/accelerate/{engine}.yaml", "--num_processes", "2"]
    command += [root / "examples/train.py", *arguments(data, output, **(SETTINGS | {"batch_size": 2}))]
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(output.glob(f"checkpoints/*/state/{pieces}"))
    assert_follows(output, one_process)
