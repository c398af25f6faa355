"""
Train LocalDiT. Run the same command again to go on where it stopped.

    accelerate launch examples/train.py --preset 512 --data-root DIR --pipeline DIR_OR_ID --output OUT
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm
from transformers import get_wsd_schedule

from ..checkpoint_io import one_line
from ..command import fail
from .buckets import batches_per_epoch, buckets
from .checkpoints import (
    averaged,
    latest_checkpoint,
    leave_weights_out,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    trainable,
)
from .conditioning import Conditioning
from .dataset import TrainingDataset, training_loader
from .engine import (
    BrokenSamples,
    as_number,
    build_accelerator,
    optimizer_state,
    stop_signal,
    sum_over_processes,
)
from .models import (
    PATCH_SIZE,
    VAE_SCALE_FACTOR,
    build_transformer,
    compile_blocks,
    memory_estimate,
    use_kernels,
)
from .objective import diffusion_loss, offset_noise, training_scheduler
from .optimizers import build_optimizer
from .settings import TrainingParser, TrainingSettings, add_arguments, resolve
from .sources import Source, open_source
from .validation import Metrics, check_plots, save_pictures, save_plot, validation_loss


def main(
    argv: list[str] | None = None,
    prog: str | None = None,
    build: Callable[[TrainingSettings], nn.Module] = build_transformer,
) -> int:
    """
    Run the command.

    Args:
        argv (`list[str]`, *optional*): The arguments; those of the process by default.
        prog (`str`, *optional*): What the command is called in messages.
        build (`Callable`, defaults to `build_transformer`): Makes the model that is trained.

    Returns:
        `int`: The exit code: 0 when done or stopped by SIGTERM, 2 for what the user can put right, 130 after Ctrl-C.
    """
    parser = TrainingParser(prog=prog, description=__doc__.strip().splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        settings = resolve(args)
        if settings.data_root is None:
            raise ValueError("give --data-root: what to train on")
        if args.dry_run:
            dry_run(settings, build)
        else:
            with stop_signal() as stop:
                train(settings, stop, build)
    except KeyboardInterrupt:
        message = "interrupted; run the same command to go on from the last checkpoint"
        return fail(parser.prog, message, 130, args.debug)
    except (ValueError, OSError, FloatingPointError) as error:
        return fail(parser.prog, one_line(error), 2, args.debug)
    except torch.OutOfMemoryError:
        advice = "--gradient-checkpointing, or a smaller --batch-size with more --gradient-accumulation-steps"
        return fail(parser.prog, f"out of memory: try {advice}", 2, args.debug)
    return 0


def train(
    settings: TrainingSettings,
    stop: Callable[[], bool] = lambda: False,
    build: Callable[[TrainingSettings], nn.Module] = build_transformer,
) -> None:
    """
    Train until `settings.steps`, from the last checkpoint in `settings.output` if there is one.

    Args:
        settings ([`TrainingSettings`]): All of it.
        stop (`Callable`, *optional*): Asked after each step whether to save and return; never, if not given.
        build (`Callable`, defaults to `build_transformer`): Makes the model that is trained.

    Raises:
        `ValueError`: A setting, the data or the pipeline is no good, or does not fit the run that is resumed.
        `FloatingPointError`: The loss or the gradient is not finite any more. Nothing has been overwritten.
        `CheckpointError`: A checkpoint cannot be written.
    """
    check_plots()
    output = Path(settings.output)
    checkpoint_folder = output / "checkpoints"
    accelerator = build_accelerator(settings)
    global_batch_size = settings.batch_size * accelerator.num_processes

    # 1. Where to go on
    with accelerator.local_main_process_first():  # which downloads shards
        source = open_source(settings.data_root)
    manifest = {
        "settings": dataclasses.asdict(settings),
        "global_batch_size": global_batch_size,
        "data": source.fingerprint(),
        "optimizer_state": optimizer_state(accelerator),
    }
    checkpoint = latest_checkpoint(checkpoint_folder)
    step = 0
    if checkpoint is not None:
        started = read_manifest(checkpoint)
        step = started["step"]
        settings.check_resumes(started, manifest)
        accelerator.print(f"going on from {checkpoint}")
    if step >= settings.steps:
        accelerator.print(f"all {settings.steps} steps are done")
        return

    # 2. Data
    with accelerator.main_process_first():  # which leaves sizes of pictures and embeddings of prompts to the others
        dataset = build_dataset(settings, source, global_batch_size)
        validation_data = build_validation_dataset(settings, source)
        conditioning = Conditioning(
            settings.pipeline,
            settings.data_root,
            source.precomputed,
            settings.validation_prompts,
            output / "prompts.safetensors",
            accelerator.device,
            text_tokens=settings.text_tokens if settings.compile else None,
        )
    loader = training_loader(
        dataset,
        accelerator.process_index,
        accelerator.num_processes,
        first_batch=step * settings.gradient_accumulation_steps,
        num_workers=settings.num_workers,
    )

    # 3. Model, optimizer, average
    set_seed(settings.seed)  # the same weights in every process
    transformer = build(settings)
    check_channels(transformer, conditioning, validation_data)
    if said := use_kernels(transformer, settings, accelerator.device):
        accelerator.print(said)
    if settings.compile:
        compile_blocks(transformer, len(dataset.sizes))
    optimizer = build_optimizer(settings, transformer)
    schedule = build_schedule(settings, optimizer)
    model, optimizer, schedule = accelerator.prepare(transformer, optimizer, schedule)
    ema = EMAModel(trainable(model), decay=settings.ema_decay) if settings.ema_decay is not None else None
    scheduler = training_scheduler()
    leave_weights_out(accelerator)
    if checkpoint is not None:
        load_checkpoint(checkpoint, accelerator, model, ema)

    # 4. Where results go
    broken = BrokenSamples(output / "broken.txt", len(source))
    broken.add(accelerator, dataset.broken)
    metrics = Metrics(output / "metrics.jsonl", step) if accelerator.is_main_process else None
    if settings.tracker is not None:
        config = {name: str(value) for name, value in dataclasses.asdict(settings).items()}
        accelerator.init_trackers("localdit", config=config)

    # 5. Train
    largest_norm = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    batches = iter(loader)
    with tqdm(total=settings.steps, initial=step, disable=not accelerator.is_main_process) as progress:
        while step < settings.steps:
            names, losses, complaints = [], [], []
            for _ in range(settings.gradient_accumulation_steps):
                batch = next(batches)
                with accelerator.accumulate(model):
                    batch_losses = sample_losses(settings, model, scheduler, conditioning, batch)
                    # A mean over all, broken samples (which have no loss) included, hence over processes too.
                    accelerator.backward(batch_losses.mean())
                names += batch["names"]
                losses.append(batch_losses.detach())
                complaints += batch["broken"]
            losses = torch.cat(losses)
            loss, num_complaints, stopping = sum_over_processes(accelerator, losses.sum(), len(complaints), stop())
            loss /= global_batch_size * settings.gradient_accumulation_steps
            if num_complaints > 0:
                broken.add(accelerator, complaints)
            norm = as_number(accelerator.clip_grad_norm_(model.parameters(), largest_norm))
            # In float16 a gradient that overflows is the scaler's affair: it leaves the step out and scales down.
            if not math.isfinite(loss) or not (math.isfinite(norm) or accelerator.scaler is not None):
                stop_diverged(step + 1, loss, norm, names, losses, latest_checkpoint(checkpoint_folder))
            row = {"step": step + 1, "loss": loss, "gradient_norm": norm, "learning_rate": schedule.get_last_lr()[0]}
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.step(trainable(model))
            step += 1

            last = step == settings.steps
            validating = last or step % settings.validate_every == 0
            if validating:
                with averaged(model, ema):
                    row |= validate(settings, accelerator, model, scheduler, conditioning, validation_data, step)
            accelerator.log(row, step)
            if accelerator.is_main_process:
                metrics.write(row)
                if validating:
                    save_plot(metrics.rows(), output / "loss.png")
            if last or stopping or step % settings.checkpoint_every == 0:
                if accelerator.is_main_process:
                    metrics.sync()
                checkpoint = save_checkpoint(
                    checkpoint_folder, step, accelerator, model, ema, manifest, settings.keep_checkpoints
                )
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
            progress.update()
            if stopping:
                break
    accelerator.end_training()
    accelerator.print(f"{'stopped' if stopping else 'done'} after step {step}: {checkpoint}")


def build_dataset(
    settings: TrainingSettings, source: Source, global_batch_size: int, size_cache: str = "sizes.json"
) -> TrainingDataset:
    return TrainingDataset(
        source,
        buckets(settings.image_size, VAE_SCALE_FACTOR * PATCH_SIZE, settings.aspect_ratio_buckets),
        latent_channels=settings.architecture.get("in_channels", 4),
        spatial_scale=VAE_SCALE_FACTOR,
        num_train_timesteps=training_scheduler().config.num_train_timesteps,
        seed=settings.seed,
        logit_normal_timesteps=settings.logit_normal_timesteps,
        caption_dropout=settings.caption_dropout,
        crop=settings.crop,
        global_batch_size=global_batch_size,
        size_cache=Path(settings.output) / size_cache,
    )


def build_validation_dataset(settings: TrainingSettings, training_source: Source) -> TrainingDataset:
    source, size_cache = training_source, "sizes.json"
    if settings.validation_root is not None:
        source, size_cache = open_source(settings.validation_root), "validation_sizes.json"
        if source.precomputed != training_source.precomputed:
            raise ValueError(
                f"{settings.validation_root} and {settings.data_root} must both be precomputed, or both hold pictures"
            )
    dataset = build_dataset(settings.replace(seed=0, caption_dropout=0, crop="center"), source, 1, size_cache)
    samples = range(min(settings.validation_samples, len(source)))
    if samples and all(dataset[0, index]["broken"] for index in samples):
        raise ValueError(
            f"none of the first {len(samples)} samples of {settings.validation_root or settings.data_root}, of which"
            f" validation is to be, can be used; the first one: {dataset[0, 0]['broken']}"
        )
    return dataset


def build_schedule(
    settings: TrainingSettings, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    steps = {"num_warmup_steps": settings.warmup_steps, "num_training_steps": settings.steps}
    if settings.lr_schedule == "warmup_stable_decay":
        return get_wsd_schedule(optimizer, num_decay_steps=settings.decay_steps, decay_type="linear", **steps)
    return get_scheduler(settings.lr_schedule, optimizer, **steps)


def check_channels(transformer: nn.Module, conditioning: Conditioning, validation_data: TrainingDataset) -> None:
    given, expected = conditioning.empty.shape[-1], transformer.config.caption_channels
    if given != expected:
        raise ValueError(
            f"the text embeddings have {given} channels, but the transformer takes {expected}: set caption_channels"
            f" in the architecture, or take another pipeline than {conditioning.pipeline}"
        )
    if validation_data.source.precomputed and validation_data.caption_channels != expected:
        raise ValueError(
            f"the text embeddings of the validation data have {validation_data.caption_channels} channels, but the"
            f" transformer takes {expected}: precompute them with the pipeline that the training data were made with"
        )


def sample_losses(
    settings: TrainingSettings,
    model: nn.Module,
    scheduler: DDPMScheduler,
    conditioning: Conditioning,
    batch: dict[str, Any],
) -> torch.Tensor:
    """The loss of each sample of a batch `(B,)`, 0 for broken ones."""
    latents, prompt_embeds, prompt_attention_mask = conditioning(batch)
    noise, timesteps, resolution, aspect_ratio, weight = (
        batch[name].to(latents.device) for name in ("noise", "timesteps", "resolution", "aspect_ratio", "weight")
    )
    losses = diffusion_loss(
        model,
        scheduler,
        latents,
        offset_noise(noise, settings.noise_offset),
        timesteps,
        prompt_embeds,
        prompt_attention_mask,
        resolution,
        aspect_ratio,
        settings.snr_gamma,
        settings.p2_gamma,
    )
    return losses * weight


def stop_diverged(
    step: int, loss: float, norm: float, names: list[str], losses: torch.Tensor, checkpoint: Path | None
) -> NoReturn:
    """Called by all processes. The samples whose own loss is not finite are named; where there is none, the batch."""
    culprits = [name for name, finite in zip(names, losses.isfinite().tolist()) if not finite]
    culprits, names = gather_object(culprits), gather_object(names)
    named = f"the samples {', '.join(culprits)}" if culprits else f"the batch {', '.join(names)}"
    raise FloatingPointError(
        f"at step {step} the loss is {loss} and the norm of the gradient {norm}, with {named}; no checkpoint was"
        " changed; " + (f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet")
    )


def validate(
    settings: TrainingSettings,
    accelerator: Accelerator,
    model: nn.Module,
    scheduler: DDPMScheduler,
    conditioning: Conditioning,
    dataset: TrainingDataset,
    step: int,
) -> dict[str, float]:
    """What there is to say of the weights that the model has now. Pictures go to `samples/`."""
    if settings.validation_prompts:
        path = Path(settings.output) / "samples" / f"step_{step:08d}.png"
        save_pictures(accelerator, model, conditioning, settings.image_size, path)
    if settings.validation_samples == 0:
        return {}
    samples = min(settings.validation_samples, len(dataset.source))
    return {"validation_loss": validation_loss(accelerator, model, scheduler, conditioning, dataset, samples)}


def dry_run(settings: TrainingSettings, build: Callable[[TrainingSettings], nn.Module] = build_transformer) -> None:
    """Say what a run would do: its settings, size, memory and length."""
    processes = PartialState(cpu=not torch.accelerator.is_available()).num_processes
    dataset = build_dataset(settings, open_source(settings.data_root), settings.batch_size * processes)
    batches = batches_per_epoch(dataset.bucket_of_sample, dataset.global_batch_size)
    steps_per_epoch = batches / settings.gradient_accumulation_steps
    transformer = build(settings)
    trained = sum(parameter.numel() for parameter in trainable(transformer))
    memory = memory_estimate(transformer, settings)
    parts = ", ".join(f"{what} {count / 1e9:,.2f}" for what, count in memory.items())
    print(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True))
    print(f"samples     {len(dataset.source):,}, of them broken {len(dataset.broken):,}")
    print(f"batch       {settings.batch_size} x {processes} processes x {settings.gradient_accumulation_steps}")
    print(f"steps       {settings.steps:,}, in an epoch {steps_per_epoch:,.1f}")
    print(f"parameters  {transformer.num_parameters():,}, of them trained {trained:,}")
    print(f"memory      {sum(memory.values()) / 1e9:,.2f} GB without VAE and text encoder, about: {parts}")
