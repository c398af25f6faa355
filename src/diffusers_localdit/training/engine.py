"""What accelerate is told, and the little that it leaves to us: stopping on a signal, sums over processes."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, gather_object, is_deepspeed_available, parse_flag_from_env

from .settings import TrainingSettings
from .sources import MOST_BROKEN


def build_accelerator(settings: TrainingSettings) -> Accelerator:
    """
    The accelerator for a run; on a CPU with arithmetic that is the same in every run.

    Raises:
        `ValueError`: The precision is not for this machine, or the tracker is not installed, or DeepSpeed is asked for
            and is not installed or cannot do what the settings say.
    """
    if settings.tracker not in (None, *(str(tracker) for tracker in get_available_trackers())):
        raise ValueError(f"--tracker {settings.tracker} needs {settings.tracker}: pip install {settings.tracker}")
    on_cpu = not torch.accelerator.is_available()
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if deepspeed:
        check_deepspeed(settings)
    if on_cpu:
        check_precision_of_cpu(settings)
    accelerator = Accelerator(
        # Unless told, accelerate would leave processes on CPUs apart; but told, it would not take DeepSpeed.
        cpu=on_cpu and not deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and deepspeed else None,
        # accelerate would have DeepSpeed round the weights to bfloat16, and the average with them.
        mixed_precision="no" if deepspeed else settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,  # else the learning rate would depend on the number of processes
        log_with=settings.tracker,
        project_dir=settings.output,
    )
    if deepspeed:
        configure_deepspeed(accelerator, settings)
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate passes the request over on a CPU, where it works all the same.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if accelerator.device.type == "cpu":
        accelerator.print("there is no accelerator here: training on the CPU")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.set_flush_denormal(True)
    return accelerator


def check_precision_of_cpu(settings: TrainingSettings) -> None:
    if settings.mixed_precision == "fp16":
        raise ValueError("there is no accelerator here, which fp16 needs: give --mixed-precision bf16 or no")


def check_deepspeed(settings: TrainingSettings) -> None:
    if not is_deepspeed_available():
        raise ValueError("the launcher's configuration asks for DeepSpeed: pip install deepspeed")
    if settings.mixed_precision == "fp16":
        raise ValueError("with DeepSpeed give --mixed-precision bf16 or no")
    if settings.optimizer == "muon":
        raise ValueError(
            "--optimizer muon needs whole matrices, which DeepSpeed cuts up: take adamw, or FSDP instead of DeepSpeed"
        )


def configure_deepspeed(accelerator: Accelerator, settings: TrainingSettings) -> None:
    """Write into DeepSpeed's configuration what the settings say, so that there is one place to say it."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed's ZeRO stage 3 is not supported: take stage 1 or 2, or FSDP, which divides weights"
        )
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": settings.max_grad_norm or 0.0,  # which is DeepSpeed's word for none
        "torch_autocast": {"enabled": settings.mixed_precision == "bf16", "dtype": "bfloat16"},
        "bf16": {"enabled": False},  # which would round the weights
        "fp16": {"enabled": False},
    }


def optimizer_state(accelerator: Accelerator) -> str:
    """In what pieces the optimizer's state is saved, for people to read. It is loaded in the same."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "divided by FSDP"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"divided by DeepSpeed among {accelerator.num_processes} processes"
    return "in one piece"


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """A function that says whether the process was sent SIGTERM while the block runs."""
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


def sum_over_processes(accelerator: Accelerator, *numbers: torch.Tensor | float) -> list[float]:
    """The sum of each number over all processes, in all of them."""
    numbers = torch.stack([torch.as_tensor(number, device=accelerator.device).double() for number in numbers])
    return accelerator.reduce(numbers, reduction="sum").tolist()


def as_number(norm: torch.Tensor) -> float:
    """What `clip_grad_norm_` returns, which may be spread over processes."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


NAMES_OF_FILES = {"encoding": "utf-8", "errors": "surrogateescape"}  # any bytes may be in them


class BrokenSamples:
    """
    Counts the samples that could not be used, each once, and names them in a file.

    Args:
        path (`Path`): The file, a line `name: reason` for each.
        samples (`int`): How many there are, broken or not.
    """

    def __init__(self, path: Path, samples: int):
        self.path = path
        self.samples = samples
        self.found = set()

    def add(self, accelerator: Accelerator, complaints: list[str]) -> None:
        """
        Note what was found in a batch. To be called by all processes, each with its own part of the batch.

        Raises:
            `ValueError`: More than 1% of the samples are broken.
        """
        self.found.update(gather_object(complaints))
        if self.found and accelerator.is_main_process:
            before = self.path.read_text(**NAMES_OF_FILES) if self.path.exists() else ""  # by an earlier run, too
            with self.path.open("a", **NAMES_OF_FILES) as file:
                file.writelines(f"{complaint}\n" for complaint in sorted(self.found - set(before.splitlines())))
        if len(self.found) > MOST_BROKEN * self.samples:
            raise ValueError(
                f"{len(self.found)} of {self.samples} samples are broken, more than {MOST_BROKEN:.0%}; one is"
                f" {min(self.found)}; all that were found are named in {self.path}"
            )
