"""
Checkpoints that are whole or not there, written so that training goes on from them as if it had never stopped.

`checkpoints/step_00001000/` holds `state/` (accelerate's: optimizer, learning rate, random numbers; under FSDP the
sharded model too), the weights in diffusers' format, in float32 and thus exact, as they are and as their average
(variant `ema`), and `checkpoint.json`.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule

from ..checkpoint_io import WRITE_ERRORS, CheckpointError, one_line, why_not_written
from ..pipeline_localdit import LocalDiTPipeline
from ..transformer_localdit import LocalDiTTransformer2DModel

STEP_FOLDER = re.compile(r"step_(\d{8,})")
MANIFEST = "checkpoint.json"  # written last
TRANSFORMER = "transformer"
EMA = "ema"


def save_checkpoint(
    folder: Path,
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    ema: EMAModel | None,
    manifest: dict[str, Any],
    keep: int,
) -> Path:
    """
    Write a checkpoint aside, move it into place, and then remove the oldest. To be called by all processes.

    Args:
        folder (`Path`): Folder of the checkpoints.
        step (`int`): Steps that have been made.
        accelerator ([`~accelerate.Accelerator`]): That has prepared the model and the optimizer.
        model (`nn.Module`): The prepared transformer.
        ema ([`EMAModel`], *optional*): Average of its trainable parameters.
        manifest (`dict`): What else to remember.
        keep (`int`): How many checkpoints are kept.

    Returns:
        `Path`: The checkpoint.

    Raises:
        `CheckpointError`: It cannot be written. What was there is untouched.
    """
    target, unfinished = folder / f"step_{step:08d}", folder / f".step_{step:08d}.unfinished"
    try:
        if accelerator.is_main_process:
            clean(folder)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished / "state"))
        save_weights(unfinished, accelerator, model)
        if ema is not None:
            with averaged(model, ema):
                save_weights(unfinished, accelerator, model, variant=EMA)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (unfinished / MANIFEST).write_text(json.dumps({"step": step} | manifest, indent=2) + "\n")
            _sync(unfinished)
            _remove(target)  # left by a run of other settings
            os.rename(unfinished, target)
            _sync_one(folder)
            for old in checkpoints(folder)[:-keep]:
                _remove(old)
        accelerator.wait_for_everyone()
    except WRITE_ERRORS as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if (why := why_not_written(error)) is None:
            raise
        last = latest_checkpoint(folder)
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {folder}: {why}"
            f" ({shutil.disk_usage(folder).free / 1e9:.1f} GB are free); "
            + (f"the last good one is {last}" if last else "there is no earlier one")
            + "; make room and run the same command again"
        ) from error
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / MANIFEST).is_file()]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder, if there is one."""
    return next(reversed(checkpoints(folder)), None)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    with complete(checkpoint):
        return json.loads((checkpoint / MANIFEST).read_text())


@contextmanager
def complete(checkpoint: Path) -> Iterator[None]:
    """Says of a checkpoint that cannot be read, as one that was copied in part, what can be done."""
    try:
        yield
    except (json.JSONDecodeError, OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        earlier = checkpoints(checkpoint.parent)
        earlier = earlier[: earlier.index(checkpoint)][-1:] if checkpoint in earlier else []
        rest = f"go on from {earlier[0]}" if earlier else "start anew"
        raise CheckpointError(
            f"{checkpoint} cannot be read ({one_line(error)[:80]}); if it is damaged, remove it to {rest}"
        ) from error


def load_checkpoint(checkpoint: Path, accelerator: Accelerator, model: nn.Module, ema: EMAModel | None) -> None:
    """Put everything back as `save_checkpoint` found it. The model and the optimizer have been prepared."""
    with complete(checkpoint):
        if ema is not None:
            load_weights(checkpoint, accelerator, model, variant=EMA)
            ema.shadow_params = [parameter.detach().clone() for parameter in trainable(model)]
            ema.optimization_step = read_manifest(checkpoint)["step"]
        load_weights(checkpoint, accelerator, model)
        accelerator.load_state(str(checkpoint / "state"))


def leave_weights_out(accelerator: Accelerator) -> None:
    """Tell accelerate that we see to the model's weights ourselves. It writes FSDP's shards all the same."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def clean(folder: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


# Weights


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def averaged(model: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Put the averaged weights into the model while the block runs. Works on sharded parameters too."""
    if ema is None:
        yield
        return
    parameters = trainable(model)
    kept = [parameter.detach().clone() for parameter in parameters]
    ema.copy_to(parameters)
    try:
        yield
    finally:
        reshard(model)
        for parameter, value in zip(parameters, kept):
            parameter.data.copy_(value)


def reshard(model: nn.Module) -> None:
    """
    Have FSDP2 forget the weights that it gathered from all processes. Of the outermost module it keeps them after a
    forward pass for a backward one; where none follows, the next forward pass would compute with them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def save_weights(folder: Path, accelerator: Accelerator, model: nn.Module, variant: str | None = None) -> None:
    """Write the transformer, or its LoRA layers alone, in diffusers' format. To be called by all processes."""
    state_dict = accelerator.get_state_dict(model)  # gathered from all, complete in the main process
    if not accelerator.is_main_process:
        return
    transformer = accelerator.unwrap_model(model)
    path = weights_path(folder, transformer, variant)
    if has_lora(transformer):
        from peft import get_peft_model_state_dict

        LocalDiTPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer, state_dict, adapter_name="default"),
            weight_name=path.name,
        )
    else:
        with torch.device("meta"):  # under FSDP the class of `transformer` itself is another
            LocalDiTTransformer2DModel.from_config(transformer.config).save_config(path.parent)
        save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, path, {"format": "pt"})


def load_weights(folder: Path, accelerator: Accelerator, model: nn.Module, variant: str | None = None) -> None:
    """Read what `save_weights` wrote, whatever the number of processes then and now."""
    transformer = accelerator.unwrap_model(model)
    state_dict = load_file(weights_path(folder, transformer, variant))
    if has_lora(transformer):
        state_dict = {
            name.removeprefix(f"{TRANSFORMER}.").replace(".weight", ".default.weight"): tensor
            for name, tensor in state_dict.items()
        }
    options = StateDictOptions(full_state_dict=True, strict=not has_lora(transformer))
    set_model_state_dict(transformer, state_dict, options=options)


def weights_path(folder: Path, transformer: nn.Module, variant: str | None) -> Path:
    stem = "pytorch_lora_weights" if has_lora(transformer) else f"{TRANSFORMER}/diffusion_pytorch_model"
    return folder / ".".join(filter(None, [stem, variant, "safetensors"]))


def has_lora(transformer: nn.Module) -> bool:
    return getattr(transformer, "peft_config", None) is not None


# Files


def _remove(folder: Path) -> None:
    """At once out of sight, so that nobody takes what is left of it for a checkpoint."""
    with suppress(FileNotFoundError):
        unlisted = folder.with_name(f".{folder.name}.old")
        os.rename(folder, unlisted)
        shutil.rmtree(unlisted, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have everything in a folder on the disk before it is given its name."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
