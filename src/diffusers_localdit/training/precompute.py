"""Pictures and captions encoded once and for all, so that training needs neither the VAE nor the text encoder."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from diffusers.utils.torch_utils import get_device
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ..checkpoint_io import one_line, read_json
from ..model_info import BUNDLED_NAME, locate
from ..pipeline_localdit import LocalDiTPipeline
from .buckets import assign, buckets
from .conditioning import EMPTY_CAPTION
from .encode import encode_captions, encode_pictures, load_parts
from .models import PATCH_SIZE
from .pictures import PictureError, decode, resize_and_crop
from .random import Stream, sample_generator
from .shards import PRECOMPUTE_SETTINGS, SHARD_NAME, UNFINISHED, DataError, write_shard
from .sources import MOST_BROKEN, BrokenSample, Source, normalize_caption, open_source

BROKEN_FILE = "broken.txt"


def precompute(
    data_root: str,
    output: str | os.PathLike,
    image_size: int,
    pipeline: str = BUNDLED_NAME,
    aspect_ratio_buckets: bool = False,
    crop: Literal["center", "random"] = "center",
    samples_per_shard: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str | None = None,
    num_workers: int = 2,
) -> None:
    """
    Encode pictures and captions, and write latents and text embeddings to tar shards that training reads.

    Shard K holds samples `K * samples_per_shard` and on, without the broken ones: `KEY.safetensors` with `latents`
    (channels, latent height, latent width) and `prompt_embeds` (tokens, channels), float16 and without padding, and
    with the sample's `name` as metadata; and `KEY.txt` with the caption as it was found. What was broken is named in
    `broken.txt`; `empty_caption.safetensors` has the `prompt_embeds` of no caption.

    A shard is there as a whole or not at all. Called again after an interruption, this goes on with the shards that
    are missing, and on the CPU all come out as they would have without the interruption, to the byte.

    Args:
        data_root (`str`): What to read, as for training.
        output (`str` or `os.PathLike`): Folder for the shards: new, empty, or begun with the same settings.
        image_size (`int`): Side in pixels of the square pictures, or of a square of the same area.
        pipeline (`str`, defaults to the bundled model): Folder or repository id that has the VAE and the text encoder.
        aspect_ratio_buckets (`bool`, defaults to `False`): Keep the pictures' shapes about as they are.
        crop (`"center"` or `"random"`, defaults to `"center"`):
            Where pictures are cut to size; at random as in the first epoch of training.
        samples_per_shard (`int`, defaults to 1000): How many samples of the source make a shard.
        seed (`int`, defaults to 0): Seed of random crops.
        batch_size (`int`, defaults to 16): How many pictures and captions are encoded at a time.
        dtype (`str`, defaults to `"float32"`): In which to encode. Not the VAE in float16, where many overflow.
        device (`str`, *optional*): Where to encode; on the accelerator by default, if there is one.
        num_workers (`int`, defaults to 2): Processes that read pictures; 0 reads them in this one.

    Raises:
        `ValueError`: `output` holds something else, the pipeline cannot be loaded, more than 1% of the samples are
        broken, or encoding gives numbers that are not finite.
    """
    output = Path(output)
    source = open_source(data_root)
    if source.precomputed:
        raise DataError(f"{data_root} is precomputed already; train with it as it is")
    settings = {
        "data": source.fingerprint(),
        "samples": len(source),
        "image_size": image_size,
        "pipeline": pipeline if pipeline == BUNDLED_NAME else str(locate(pipeline)),
        "aspect_ratio_buckets": aspect_ratio_buckets,
        "crop": crop,
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
    }
    _check_output(output, settings)
    shards = [output / SHARD_NAME.format(number) for number in range(math.ceil(len(source) / samples_per_shard))]
    missing = {number: path for number, path in enumerate(shards) if not path.exists()}
    if not missing:
        return
    indices = [index for index in range(len(source)) if index // samples_per_shard in missing]

    dtypes = {"text_encoder": getattr(torch, dtype), "vae": torch.bfloat16 if dtype == "bfloat16" else torch.float32}
    pipe = load_parts(pipeline, "tokenizer", "text_encoder", "vae", dtypes=dtypes).to(device or get_device())
    sizes = buckets(image_size, pipe.vae_scale_factor * PATCH_SIZE, aspect_ratio_buckets)
    empty_caption = {"prompt_embeds": _unpadded_embeds(pipe, [""])[0]}

    log = output / BROKEN_FILE
    output.mkdir(parents=True, exist_ok=True)
    _write_whole(output / PRECOMPUTE_SETTINGS, json.dumps(settings, indent=2).encode() + b"\n")
    _write_whole(output / EMPTY_CAPTION, safetensors.torch.save(empty_caption))
    _forget(log, set(indices))
    rest = Subset(Cuts(source, sizes, crop, seed), indices)
    loader = DataLoader(rest, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is)
    done = len(source) - len(indices)
    with tqdm(loader, desc="Encoding", initial=done, total=len(source), unit=" samples") as progress:
        cuts = iter(progress)
        for path in missing.values():
            encoded = {}
            usable = _name_broken(islice(cuts, samples_per_shard), log, most=MOST_BROKEN * len(source))
            for batch in _batches_of_one_size(usable, batch_size):
                encoded.update(_encode_samples(pipe, batch))
            try:
                write_shard(path, sorted(encoded.items()))
            except OSError as error:
                raise DataError(
                    f"cannot write {path}: {error.strerror}; put it right and run again, the shards before are whole"
                ) from error


class Cut(NamedTuple):
    """A picture of the source, cut to its bucket: `pixel_values` (3, height, width) from -1 to 1."""

    index: int
    name: str
    caption: str
    pixel_values: np.ndarray  # not a tensor, as every tensor from another process holds a file open


class Cuts(Dataset):
    """The pictures of a source as the first epoch of training sees them; a `BrokenSample` in place of a broken one."""

    def __init__(self, source: Source, sizes: list[tuple[int, int]], crop: str, seed: int):
        self.source, self.sizes, self.crop, self.seed = source, sizes, crop, seed

    def __getitem__(self, index: int) -> Cut | tuple[int, BrokenSample]:
        try:
            sample = self.source.read(index)
            image = decode(sample.picture)
        except BrokenSample as broken:
            return index, broken
        except PictureError as error:
            return index, BrokenSample(sample.name, str(error))
        height, width = assign(image.height, image.width, self.sizes)
        generator = sample_generator(self.seed, 0, index, Stream.CROP)
        pixel_values = resize_and_crop(image, height, width, self.crop, generator)
        return Cut(index, sample.name, sample.caption, pixel_values.contiguous().numpy())


def _as_it_is(cut: Any) -> Any:
    return cut


def _name_broken(cuts: Iterable[Cut | tuple[int, BrokenSample]], log: Path, most: float) -> Iterator[Cut]:
    """Passes on what is not broken and writes a line about what is."""
    for cut in cuts:
        if isinstance(cut, Cut):
            yield cut
            continue
        index, broken = cut
        with log.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"{index}\t{one_line(broken)}\n")
        count = len(_lines(log))
        if count > most:
            raise DataError(
                f"{count} samples are broken, more than {MOST_BROKEN:.0%} of the data ({log} names them); repair or "
                "remove them and begin again with another OUTPUT"
            )


def _batches_of_one_size(cuts: Iterable[Cut], batch_size: int) -> Iterator[list[Cut]]:
    """Puts pictures of the same size together, a batch as soon as it is full; what is left comes last."""
    waiting = defaultdict(list)
    for cut in cuts:
        size = cut.pixel_values.shape
        waiting[size].append(cut)
        if len(waiting[size]) == batch_size:
            yield waiting.pop(size)
    yield from waiting.values()


# Encoding


def _encode_samples(pipe: LocalDiTPipeline, batch: list[Cut]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The key of each sample and its members by extension."""
    latents = encode_pictures(pipe.vae, torch.from_numpy(np.stack([cut.pixel_values for cut in batch]))).half().cpu()
    embeds = _unpadded_embeds(pipe, [normalize_caption(cut.caption) for cut in batch])
    for i, cut in enumerate(batch):
        tensors = {"latents": latents[i].contiguous(), "prompt_embeds": embeds[i]}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{cut.name} gives numbers that are not finite in float16; choose another --dtype")
        # One entry only: safetensors writes several in random order, and shards are to be the same to the byte.
        content = safetensors.torch.save(tensors, metadata={"name": cut.name.encode(errors="replace").decode()})
        yield f"{cut.index:08d}", {"safetensors": content, "txt": cut.caption.encode()}


def _unpadded_embeds(pipe: LocalDiTPipeline, captions: list[str]) -> list[torch.Tensor]:
    embeds, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, captions)
    return [tokens[attend.bool()].half().cpu() for tokens, attend in zip(embeds, mask)]


# Files


def _check_output(output: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder that was begun with other settings, or where other files lie."""
    path = output / PRECOMPUTE_SETTINGS
    if path.exists():
        begun = read_json(path)
        if differing := [name for name, value in settings.items() if begun.get(name) != value]:
            raise ValueError(
                f"{output} was begun with other settings: "
                + ", ".join(f"{name} was {begun.get(name)} and is {settings[name]}" for name in differing)
                + "; repeat them to go on, or choose another OUTPUT"
            )
    elif output.exists() and (others := [one.name for one in output.iterdir() if one.suffix != UNFINISHED]):
        raise ValueError(f"{output} holds {min(others)} and no {PRECOMPUTE_SETTINGS}; choose a new or empty OUTPUT")


def _write_whole(path: Path, content: bytes) -> None:
    """Not by `written_whole`, of which a killed process would leave a folder behind that nobody removes."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _lines(log: Path) -> list[bytes]:
    return log.read_bytes().splitlines(keepends=True) if log.exists() else []


def _forget(log: Path, indices: set[int]) -> None:
    """Drops what was said of samples that will be read again, and a line that was cut off."""
    kept = [line for line in _lines(log) if line.endswith(b"\n") and int(line.split(b"\t")[0]) not in indices]
    _write_whole(log, b"".join(kept))
