"""Batches of pictures of one size: the sizes, which picture gets which, and the order of an epoch."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..checkpoint_io import one_line, written_whole
from ..pipeline_localdit import ASPECT_RATIO_BINS
from .random import Stream, stream_seed
from .shards import DataError
from .sources import BrokenSample, Source

UNUSABLE = -1
BUCKETS_PER_SIDE = 16  # as many as PixArt's tables have


def buckets(image_size: int, step: int, aspect_ratio_buckets: bool = True) -> list[tuple[int, int]]:
    """
    Sizes of about `image_size`^2 pixels from 1:4 to 4:1, where the pipelines have a table of such sizes that table.

    Args:
        image_size (`int`): Side in pixels of the square among them.
        step (`int`): Every side is a multiple of it (the VAE's factor times the patch size).
        aspect_ratio_buckets (`bool`, defaults to `True`): Off: the square only.

    Returns:
        `list[tuple[int, int]]`: Heights and widths, from the widest to the tallest.

    Raises:
        `DataError`: `image_size` is no multiple of `step`.
    """
    if image_size < step or image_size % step:
        raise DataError(f"the image size is {image_size}; expected a multiple of {step}")
    if not aspect_ratio_buckets:
        return [(image_size, image_size)]
    table = ASPECT_RATIO_BINS.get(image_size, {}).values()
    sizes = {(int(height), int(width)) for height, width in table}
    if not sizes or any(side % step for size in sizes for side in size):
        stride = -(-image_size // (BUCKETS_PER_SIDE * step)) * step
        wide = {
            (image_size**2 // width // step * step, width) for width in range(image_size, 2 * image_size + 1, stride)
        }
        sizes = wide | {(width, height) for height, width in wide}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def assign(height: int, width: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size, of those that [`buckets`] gives, whose aspect ratio is nearest to that of a picture."""
    return sizes[assign_all(np.array([[height, width]]), sizes)[0]]


def assign_all(picture_sizes: np.ndarray, sizes: list[tuple[int, int]]) -> np.ndarray:
    """Indices into `sizes` for heights and widths `(pictures, 2)`, `UNUSABLE` where these are 0."""
    usable = picture_sizes.min(axis=1) > 0
    aspects = _log_aspects(sizes)
    places = np.full(len(picture_sizes), UNUSABLE)
    places[usable] = np.searchsorted((aspects[1:] + aspects[:-1]) / 2, _log_aspects(picture_sizes[usable]))
    return places


def _log_aspects(sizes: np.ndarray | list[tuple[int, int]]) -> np.ndarray:
    heights, widths = np.asarray(sizes, dtype=np.float64).reshape(-1, 2).T
    return np.log(heights / widths)


def merge_small_buckets(
    bucket_of_sample: np.ndarray, sizes: list[tuple[int, int]], global_batch_size: int
) -> np.ndarray:
    """
    Move samples until every bucket that has any can fill a batch (or only one has any): those of the smallest go to
    the bucket of the nearest aspect ratio, and so on.
    """
    merged, aspects = bucket_of_sample.copy(), _log_aspects(sizes)
    counts = np.bincount(merged[merged != UNUSABLE], minlength=len(sizes))
    while np.count_nonzero(counts) > 1 and counts[counts > 0].min() < global_batch_size:
        smallest = np.where(counts > 0, counts, counts.max() + 1).argmin()
        distances = np.where(counts > 0, abs(aspects - aspects[smallest]), np.inf)
        distances[smallest] = np.inf
        nearest = distances.argmin()
        merged[merged == smallest] = nearest
        counts[nearest] += counts[smallest]
        counts[smallest] = 0
    return merged


def batches_per_epoch(bucket_of_sample: np.ndarray, global_batch_size: int) -> int:
    counts = np.bincount(bucket_of_sample[bucket_of_sample != UNUSABLE])
    return int((counts // global_batch_size).sum())


def plan_epoch(bucket_of_sample: np.ndarray, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """
    The batches of an epoch in their order.

    What is left of a bucket after its last whole batch is not seen in this epoch; it is others in the next.

    Args:
        bucket_of_sample (`np.ndarray`): Of each sample of the source; `UNUSABLE` ones are left out.
        global_batch_size (`int`): Samples in a batch of all processes together.
        seed (`int`): Of the run.
        epoch (`int`): From 0.

    Returns:
        `np.ndarray` of shape `(batches, global_batch_size)`: Indices of samples, each once at most, each row of one
        bucket.
    """
    generator = np.random.default_rng(stream_seed(seed, epoch, Stream.ORDER))
    order = generator.permutation(np.flatnonzero(bucket_of_sample != UNUSABLE))
    batches = []
    for bucket in np.unique(bucket_of_sample[order]):
        members = order[bucket_of_sample[order] == bucket]
        whole = len(members) // global_batch_size * global_batch_size
        batches.append(members[:whole].reshape(-1, global_batch_size))
    return generator.permutation(np.concatenate(batches))


def read_sizes(source: Source, cache: Path | None = None) -> tuple[np.ndarray, list[str]]:
    """
    The sizes of all samples (see [`Source.size`]).

    Args:
        source ([`Source`]): Of which every header is read.
        cache (`Path`, *optional*):
            A JSON file, where the sizes are kept and found again as long as the names in the source are the same.
            Pictures that were broken stay out of the run for as long: their number decides the order of all others.

    Returns:
        `tuple[np.ndarray, list[str]]`: Heights and widths `(samples, 2)`, 0 for broken samples, and these with
        their reasons.
    """
    fingerprint = source.fingerprint()
    if cache is not None and cache.exists():
        try:
            known = json.loads(cache.read_text())
        except ValueError as error:
            raise ValueError(f"{cache} is damaged ({one_line(error)}); remove it to have it made again") from error
        if known["fingerprint"] == fingerprint:
            return np.array(known["sizes"]), known["broken"]

    def size(index: int) -> tuple[int, int] | BrokenSample:
        try:
            return source.size(index)
        except BrokenSample as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = pool.map(size, range(len(source)))
        found = list(tqdm(found, desc="Reading sizes", total=len(source), leave=False, disable=None))
    broken = [str(one) for one in found if isinstance(one, BrokenSample)]
    sizes = [(0, 0) if isinstance(one, BrokenSample) else one for one in found]
    if cache is not None:
        with written_whole(cache, overwrite=True) as scratch:
            scratch.write_text(json.dumps({"fingerprint": fingerprint, "sizes": sizes, "broken": broken}))
    return np.array(sizes), broken
