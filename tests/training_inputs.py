"""A few precomputed samples and the settings of a training run that takes seconds, for tests in real processes."""

import io
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import socket
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load, load_file, save, save_file

PROCESSES = multiprocessing.get_context("forkserver")
# Of DeepSpeed accelerate asks in every run whether the model is one of its own.
PRELOADED = ["diffusers_localdit.training.train", "matplotlib.figure", "matplotlib.backends.backend_agg", "deepspeed"]
PROCESSES.set_forkserver_preload(PRELOADED)
os.environ["DS_ACCELERATOR"] = "cpu"  # or it would look for others when it is imported
NUMBERS = itertools.count()
CHANNELS = 8  # of the text embeddings
# Without accelerator, even where there is one: exact resuming is promised for the CPU.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
TINY = {
    "image_size": 32,
    "batch_size": 4,
    "num_workers": 0,
    "mixed_precision": "no",
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "max_grad_norm": 1.0,
    "ema_decay": 0.9,
    "steps": 8,
    "checkpoint_every": 2,
    "validate_every": 5,
    "validation_samples": 2,
    "architecture": json.dumps(
        {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "caption_channels": CHANNELS}
    ),
}


def write_shard(
    folder: Path, samples: int = 24, latent_side: int = 4, latent_channels: int = 4, channels: int = CHANNELS
) -> Path:
    """What `localdit precompute` leaves: latents and embeddings of random numbers, the empty caption."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for index in range(samples):
            tensors = {
                "latents": torch.randn(latent_channels, latent_side, latent_side, generator=generator).half(),
                "prompt_embeds": torch.randn(1 + index % 3, channels, generator=generator).half(),
            }
            for name, content in ((f"{index:06d}.safetensors", save(tensors)), (f"{index:06d}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    save_file({"prompt_embeds": torch.randn(1, channels, generator=generator)}, folder / "empty_caption.safetensors")
    return folder


def rewrite_sample(data: Path, copy: Path, key: str, **changes: torch.Tensor) -> None:
    """A copy of precomputed data in which one sample is another."""
    shutil.copytree(data, copy)
    with tarfile.open(data / "shard-000000.tar") as old, tarfile.open(copy / "shard-000000.tar", "w") as new:
        for member in old:
            content = old.extractfile(member).read()
            if member.name == f"{key}.safetensors":
                content = save(load(content) | changes)
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))


def arguments(data: Path, output: Path, **changes) -> list[str]:
    words = []
    for name, value in (TINY | {"data_root": data, "output": output} | changes).items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


@pytest.fixture
def own_process_as_before():
    """Undoes what a run in the process of the tests leaves set."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_flush_denormal(False)


class Training(PROCESSES.Process):
    """
    `localdit train` in a process of its own, forked off one that has imported everything.

    Args:
        data, output (`Path`): `--data-root` and `--output`.
        env (`dict[str, str]`, *optional*): Of the process.
        size_limit (`int`, *optional*): Bytes beyond which no file grows, as on a disk that is full.
        changes (*optional*): Settings other than those of `TINY`.
    """

    def __init__(self, data: Path, output: Path, env: dict | None = None, size_limit: int | None = None, **changes):
        super().__init__()
        self.arguments = arguments(data, output, **changes)
        self.env = env or {}
        self.size_limit = size_limit
        self.log = output.with_name(f"{output.name}-{next(NUMBERS)}.log")
        self.start()

    def run(self) -> None:
        os.environ.update(ENVIRONMENT | self.env)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if self.size_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size_limit, resource.RLIM_INFINITY))
        torch.set_num_threads(1)
        if "DS_ACCELERATOR" in self.env:  # or it compiles for a minute and a half what speeds up sums of processes
            from deepspeed.ops import __compatible_ops__

            __compatible_ops__["deepspeed_shm_comm"] = False
        # As in a process that was not forked off a server: so that the loader's workers notice their parent's death.
        multiprocessing.set_start_method("fork", force=True)
        from diffusers_localdit.training.train import main

        sys.exit(main(self.arguments, prog="train"))

    def finish(self, code: int = 0) -> str:
        """What the process wrote, after its exit with the expected code."""
        self.join()
        output = self.log.read_text()
        assert self.exitcode == code, f"exit code {self.exitcode}\n{output}"
        return output

    def error(self) -> str:
        """The message with which the process failed."""
        (line,) = [line for line in self.finish(code=2).splitlines() if line.startswith("train: error: ")]
        return line.removeprefix("train: error: ")


def run_processes(data: Path, output: Path, count: int, env: dict | None = None, **changes) -> list[Training]:
    """A run of several processes that talk to each other, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        | (env or {})
        for rank in range(count)
    ]
    return [Training(data, output, rank, **changes) for rank in ranks]


def weights(output: Path, step: int, variant: str = "") -> dict[str, torch.Tensor]:
    name = f"diffusion_pytorch_model{variant}.safetensors"
    return load_file(output / "checkpoints" / f"step_{step:08d}" / "transformer" / name)


def rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(output: Path, reference: Path, step: int) -> None:
    """Bit for bit: metrics, plot, weights, their average, the optimizer's state, the learning rate."""
    assert (output / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert (output / "loss.png").read_bytes() == (reference / "loss.png").read_bytes()
    for variant in ("", ".ema"):
        ours, theirs = weights(output, step, variant), weights(reference, step, variant)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    for file in ("optimizer.bin", "scheduler.bin"):
        path = Path("checkpoints", f"step_{step:08d}", "state", file)
        ours, theirs = torch.load(output / path, weights_only=True), torch.load(reference / path, weights_only=True)
        assert_equal(ours, theirs)


def assert_equal(ours, theirs) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs):
            assert_equal(*pair)
    elif isinstance(theirs, torch.Tensor):
        assert ours.equal(theirs)
    else:
        assert ours == theirs
