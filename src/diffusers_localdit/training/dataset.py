"""Samples with everything that is random about them, and the endless, resumable stream of their batches."""

import logging
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from ..checkpoint_io import one_line
from .buckets import UNUSABLE, assign_all, batches_per_epoch, merge_small_buckets, plan_epoch, read_sizes
from .pictures import PictureError, decode, resize_and_crop
from .random import Stream, sample_generator
from .shards import DataError
from .sources import BrokenSample, RawSample, Source, normalize_caption

LOGIT_DEVIATION = 0.75  # of logit-normal timesteps: two thirds of them lie between 320 and 680

logger = logging.getLogger(__name__)


class TrainingDataset(Dataset):
    """
    Samples by (epoch, index). All that is random about one depends on these two and on the seed, on nothing else.

    Args:
        source ([`Source`]):
            Pictures with captions, or what was precomputed of them.
        sizes (`list[tuple[int, int]]`):
            Heights and widths in pixels that pictures are brought to (from [`buckets`]); those of precomputed
            samples must be among them.
        latent_channels (`int`):
            Of the VAE.
        spatial_scale (`int`):
            Pixels per latent, along each side.
        num_train_timesteps (`int`):
            Timesteps are drawn from 0 up to, not including, this number.
        seed (`int`):
            Of the run, not negative.
        logit_normal_timesteps (`float`, defaults to 0.0):
            Share of the timesteps that is drawn around the middle (see [`draw_timestep`]), the rest uniformly.
        caption_dropout (`float`, defaults to 0.0):
            Share of samples that lose their caption, drawn anew in each epoch.
        crop (`"center"` or `"random"`, defaults to `"center"`):
            What pictures lose, if their shape is not that of their size. Precomputed samples are cropped already.
        global_batch_size (`int`, defaults to 1):
            Sizes that fewer pictures than this have nearest to them are not used.
        size_cache (`Path`, *optional*):
            JSON file to keep the sizes of the pictures in, see [`read_sizes`].

    Attributes:
        bucket_of_sample (`np.ndarray`): An index into `sizes` for each sample, negative for those in `broken`.
        broken (`list[str]`): Names and reasons of the samples whose size could not be read, which are never drawn.

    Raises:
        `DataError`: There are too few samples, or precomputed ones have other sizes or channels.
    """

    def __init__(
        self,
        source: Source,
        sizes: list[tuple[int, int]],
        latent_channels: int,
        spatial_scale: int,
        num_train_timesteps: int,
        seed: int,
        logit_normal_timesteps: float = 0.0,
        caption_dropout: float = 0.0,
        crop: Literal["center", "random"] = "center",
        global_batch_size: int = 1,
        size_cache: Path | None = None,
    ):
        self.source = source
        self.sizes = sizes
        self.latent_channels = latent_channels
        self.spatial_scale = spatial_scale
        self.num_train_timesteps = num_train_timesteps
        self.seed = seed
        self.logit_normal_timesteps = logit_normal_timesteps
        self.caption_dropout = caption_dropout
        self.crop = crop
        self.global_batch_size = global_batch_size
        if source.precomputed:
            found, self.broken = read_sizes(source, size_cache)
            self._check_sizes(found * spatial_scale)
            self.bucket_of_sample = assign_all(found, sizes)
            self.caption_channels = self._find_caption_channels()
            self._tell_of_small_buckets()
        else:
            if len(sizes) == 1:  # then the sizes of the pictures decide nothing, and training starts at once
                found, self.broken = np.ones((len(source), 2)), []
            else:
                found, self.broken = read_sizes(source, size_cache)
            self.bucket_of_sample = merge_small_buckets(assign_all(found, sizes), sizes, global_batch_size)
        if not batches_per_epoch(self.bucket_of_sample, global_batch_size):
            raise DataError(
                f"the {len(source) - len(self.broken)} usable samples do not fill one batch of {global_batch_size} "
                "(batch size times processes) of one size; expected more samples or a smaller batch"
            )

    def _check_sizes(self, found: np.ndarray) -> None:
        strange = {tuple(size) for size in np.unique(found, axis=0).tolist()} - {*self.sizes, (0, 0)}
        if strange:
            height, width = min(strange)
            raise DataError(
                f"samples were precomputed at {height} x {width} pixels; expected the image size and the setting of "
                "aspect ratio buckets of training to be those of precomputing"
            )

    def _tell_of_small_buckets(self) -> None:
        """What was cut to one size cannot be moved to another."""
        counts = np.bincount(self.bucket_of_sample[self.bucket_of_sample != UNUSABLE])
        lost = counts[counts < self.global_batch_size].sum()
        if lost:
            logger.warning(
                f"{lost} of {len(self)} precomputed samples are never drawn: there are fewer of their sizes than the "
                f"{self.global_batch_size} of one batch"
            )

    def _find_caption_channels(self) -> int:
        for index in np.flatnonzero(self.bucket_of_sample != UNUSABLE):
            with suppress(BrokenSample):
                return _encoded(self.source.read(index))["prompt_embeds"].shape[1]
        raise DataError(f"none of the {len(self.source)} precomputed samples can be read")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The sample of an (epoch, index), to be put together by [`collate`]."""
        epoch, index = key
        height, width = self.sizes[self.bucket_of_sample[index]]
        latents_shape = (self.latent_channels, height // self.spatial_scale, width // self.spatial_scale)

        def generator(stream: Stream) -> torch.Generator:
            return sample_generator(self.seed, epoch, index, stream)

        caption_dropped = torch.rand((), generator=generator(Stream.CAPTION_DROPOUT)) < self.caption_dropout
        sample = {
            "noise": torch.randn(latents_shape, generator=generator(Stream.NOISE)),
            "timesteps": draw_timestep(
                self.num_train_timesteps, self.logit_normal_timesteps, generator(Stream.TIMESTEP)
            ),
            "resolution": torch.tensor([height, width], dtype=torch.float32),
            "aspect_ratio": torch.tensor([width / height]),
        }
        try:
            raw = self.source.read(index)
            if self.source.precomputed:
                content = self._latents(raw, latents_shape)
            else:
                content = self._pixels(raw, height, width, generator(Stream.CROP))
            sample |= content | {"names": raw.name, "broken": None, "weight": torch.tensor(1.0)}
        except BrokenSample as error:
            content = self._nothing(height, width, latents_shape)
            sample |= content | {"names": error.name, "broken": str(error), "weight": torch.tensor(0.0)}
        if self.source.precomputed:
            sample["caption_dropped"] = caption_dropped
        elif caption_dropped:
            sample["captions"] = ""
        return sample

    def _pixels(self, raw: RawSample, height: int, width: int, generator: torch.Generator) -> dict[str, Any]:
        try:
            picture = decode(raw.picture)
        except PictureError as error:
            raise BrokenSample(raw.name, str(error)) from error
        pixel_values = resize_and_crop(picture, height, width, self.crop, generator)
        return {"pixel_values": pixel_values, "captions": normalize_caption(raw.caption)}

    def _latents(self, raw: RawSample, latents_shape: tuple[int, ...]) -> dict[str, Any]:
        content = _encoded(raw)
        shape, channels = tuple(content["latents"].shape), content["prompt_embeds"].shape[1]
        if shape != latents_shape or channels != self.caption_channels:
            raise BrokenSample(
                raw.name,
                f"has latents of shape {shape} and embeddings of {channels} channels; expected {latents_shape} and "
                f"{self.caption_channels}",
            )
        return content

    def _nothing(self, height: int, width: int, latents_shape: tuple[int, ...]) -> dict[str, Any]:
        """Stands in for a broken sample, so that the batch keeps its shape."""
        if self.source.precomputed:
            return {"latents": torch.zeros(latents_shape), "prompt_embeds": torch.zeros(1, self.caption_channels)}
        return {"pixel_values": torch.zeros(3, height, width), "captions": ""}


def draw_timestep(num_timesteps: int, logit_normal_share: float, generator: torch.Generator) -> torch.Tensor:
    """
    A timestep that is uniform or, with the probability `logit_normal_share`, logit-normal: around the middle, where
    the text decides what goes where (Esser et al. 2024, https://arxiv.org/abs/2403.03206).
    """
    uniform = torch.randint(num_timesteps, (), generator=generator)
    if torch.rand((), generator=generator) >= logit_normal_share:
        return uniform
    place = torch.sigmoid(LOGIT_DEVIATION * torch.randn((), generator=generator, dtype=torch.float64))
    return (place * num_timesteps).long()


def _encoded(raw: RawSample) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(raw.encoded)
        latents, prompt_embeds = tensors["latents"], tensors["prompt_embeds"]
    except (SafetensorError, KeyError) as error:
        raise BrokenSample(raw.name, f"holds no latents and prompt_embeds ({one_line(error)})") from error
    if prompt_embeds.ndim != 2 or not len(prompt_embeds):
        raise BrokenSample(raw.name, f"has prompt_embeds {tuple(prompt_embeds.shape)}; expected (tokens, channels)")
    return {"latents": latents.float(), "prompt_embeds": prompt_embeds.float()}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """
    One batch of samples of the same size.

    Args:
        samples (`list[dict]`): Items of a [`TrainingDataset`].

    Returns:
        `dict`, whose tensors are float32 on the CPU except where it says otherwise:

        - `names`, `list[str]`; `broken`, `list[str]` of those that could not be read, with their reasons
        - `weight (B,)`: 0 where a sample is broken and zeros stand in its place, otherwise 1
        - `noise (B, channels, latent height, latent width)`, standard normal; `timesteps (B,)`, int64
        - `resolution (B, 2)`, height and width in pixels; `aspect_ratio (B, 1)`, width / height

        of pictures

        - `pixel_values (B, 3, height, width)`, from -1 to 1
        - `captions`, `list[str]`, in lower case without blanks around, empty where dropped

        and of precomputed samples

        - `latents`, shaped as `noise`
        - `prompt_embeds (B, tokens, caption channels)`, padded with zeros to the longest, as if none was dropped
        - `prompt_attention_mask (B, tokens)`, int64, 0 for padding; `caption_dropped (B,)`, bool
    """
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch = {"broken": [reason for reason in columns.pop("broken") if reason is not None]}
    if "prompt_embeds" in columns:
        embeds = columns.pop("prompt_embeds")
        masks = [torch.ones(len(tokens), dtype=torch.int64) for tokens in embeds]
        batch["prompt_embeds"] = pad_sequence(embeds, batch_first=True)
        batch["prompt_attention_mask"] = pad_sequence(masks, batch_first=True)
    for name, values in columns.items():
        batch[name] = torch.stack(values) if isinstance(values[0], torch.Tensor) else values
    return batch


class _EndlessBatches(Sampler[list[tuple[int, int]]]):
    """This process' slice of every global batch from `first_batch` on, through all epochs."""

    def __init__(self, dataset: TrainingDataset, process_index: int, num_processes: int, first_batch: int):
        self.dataset = dataset
        self.process_index = process_index
        self.num_processes = num_processes
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        buckets, global_batch_size = self.dataset.bucket_of_sample, self.dataset.global_batch_size
        epoch, batch = divmod(self.first_batch, batches_per_epoch(buckets, global_batch_size))
        while True:
            plan = plan_epoch(buckets, global_batch_size, self.dataset.seed, epoch)
            slices = plan.reshape(len(plan), self.num_processes, -1)[:, self.process_index]
            for indices in slices[batch:].tolist():
                yield [(epoch, index) for index in indices]
            epoch, batch = epoch + 1, 0


def _outlast_sigterm(worker: int) -> None:
    """Schedulers send SIGTERM to all processes of a run, which then still has a step to finish and to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def training_loader(
    dataset: TrainingDataset,
    process_index: int = 0,
    num_processes: int = 1,
    first_batch: int = 0,
    num_workers: int = 0,
) -> DataLoader:
    """
    The endless stream of a process' part of each global batch, as [`collate`] gives it.

    The global batches are the same whatever the number of processes and workers. Not to be passed to
    `accelerator.prepare`, which would divide it once more.

    Args:
        dataset ([`TrainingDataset`]): Whose `global_batch_size` is that of all processes together.
        process_index (`int`, defaults to 0): Of this process.
        num_processes (`int`, defaults to 1): Must divide the global batch size.
        first_batch (`int`, defaults to 0): Number of the global batch to start with: of those that were trained on.
        num_workers (`int`, defaults to 0): Processes that read ahead; with none this process reads.
    """
    if dataset.global_batch_size % num_processes:
        raise DataError(
            f"{num_processes} processes cannot share batches of {dataset.global_batch_size}; expected a multiple"
        )
    return DataLoader(
        dataset,
        batch_sampler=_EndlessBatches(dataset, process_index, num_processes, first_batch),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_outlast_sigterm,
        pin_memory=torch.cuda.is_available(),
        # Otherwise the loader would draw the seed of its workers from the random numbers of the run.
        generator=torch.Generator(),
    )
