import itertools
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from diffusers_localdit.training.buckets import batches_per_epoch, buckets
from diffusers_localdit.training.dataset import (
    LOGIT_DEVIATION,
    TrainingDataset,
    collate,
    draw_timestep,
    training_loader,
)
from diffusers_localdit.training.random import Stream, sample_generator, stream_seed
from diffusers_localdit.training.shards import DataError, write_shard
from diffusers_localdit.training.sources import open_source

SIZES = buckets(64, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 pictures of several shapes; one is broken, another has no caption."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(37):
        shape = ((40, 80), (64, 64), (90, 60), (30, 110))[number % 4]
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f" Picture {number}\n")
    (folder / "05.png").write_bytes(b"not a picture")
    (folder / "06.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """30 precomputed samples of two sizes, the latents filled with their number, captions of 1 to 5 tokens."""
    folder = tmp_path_factory.mktemp("precomputed")
    samples = []
    for number in range(30):
        shape = (4, 8, 8) if number % 3 else (4, 6, 10)
        tensors = {
            "latents": torch.full(shape, number, dtype=torch.float16),
            "prompt_embeds": torch.full((1 + number % 5, 6), number, dtype=torch.float16),
        }
        samples.append((f"{number:08}", {"safetensors": safetensors.torch.save(tensors), "txt": b"a caption"}))
    for number in range(3):
        write_shard(folder / f"shard-{number:06}.tar", samples[number * 10 : number * 10 + 10])
    return folder


def dataset(root, sizes=SIZES, **options):
    options = {"seed": 0, "caption_dropout": 0.3, "crop": "random", "global_batch_size": 4} | options
    return TrainingDataset(
        open_source(root), sizes, latent_channels=4, spatial_scale=8, num_train_timesteps=1000, **options
    )


def stream(data, batches, **options):
    """The first so many batches of a process."""
    loader = training_loader(data, **options)
    return list(itertools.islice(loader, batches))


def joined(parts):
    """Of the batches of several processes the batch of one."""
    whole = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        whole[name] = torch.cat(values) if isinstance(first, torch.Tensor) else list(itertools.chain(*values))
    return whole


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        equal = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert equal, name


def test_batches_of_pictures(folder):
    data = dataset(folder)
    (batch,) = stream(data, 1)
    height, width = batch["resolution"][0].long().tolist()
    assert (height, width) in SIZES
    assert batch["pixel_values"].shape == (4, 3, height, width) and batch["pixel_values"].dtype == torch.float32
    assert batch["noise"].shape == (4, 4, height // 8, width // 8) and batch["noise"].dtype == torch.float32
    assert batch["timesteps"].shape == (4,) and batch["timesteps"].dtype == torch.int64
    assert torch.equal(batch["resolution"], torch.tensor([[height, width]] * 4, dtype=torch.float32))
    assert torch.equal(batch["aspect_ratio"], torch.full((4, 1), width / height))
    for name, caption in zip(batch["names"], batch["captions"]):
        assert caption in ("", f"picture {int(name[:2])}")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_stream_is_the_same_for_all_numbers_of_processes_and_workers(folder, num_processes, num_workers):
    data = dataset(folder)
    expected = stream(data, 20)  # into the third epoch
    parts = [
        stream(data, 20, process_index=index, num_processes=num_processes, num_workers=num_workers)
        for index in range(num_processes)
    ]
    for expected_batch, *batches in zip(expected, *parts):
        assert_equal(joined(batches), expected_batch)


def test_the_stream_goes_on_at_any_batch(folder):
    data = dataset(folder)
    batches = stream(data, 20)
    per_epoch = batches_per_epoch(data.bucket_of_sample, 4)
    assert 2 * per_epoch < 20
    for first in range(20):
        found = stream(dataset(folder), min(2, 20 - first), first_batch=first)
        for batch, expected in zip(found, batches[first:]):
            assert_equal(batch, expected)


def test_every_epoch_draws_anew_and_shows_each_sample_once(folder):
    data = dataset(folder, global_batch_size=1)
    usable = [f"{number:02}.png" for number in range(37) if number != 5]
    epochs = [stream(data, 36, first_batch=36 * epoch) for epoch in range(2)]
    shown = [{batch["names"][0]: batch for batch in epoch} for epoch in epochs]
    assert [sorted(names) for names in shown] == [usable, usable]
    assert not any(torch.equal(*(epoch[name]["noise"] for epoch in shown)) for name in usable)
    # There are few places for a crop of these pictures, and only one where the shape is that of the size.
    assert sum(not torch.equal(*(epoch[name]["pixel_values"] for epoch in shown)) for name in usable) > 9
    for what in ("timesteps", "captions"):
        assert [epoch[name][what][0] for name in usable for epoch in shown[:1]] != [
            epoch[name][what][0] for name in usable for epoch in shown[1:]
        ]


def test_what_is_drawn_is_distributed_as_it_should_be(shards):
    """A caption is dropped independently of all else; noise is normal; timesteps are uniform."""
    data = dataset(shards, caption_dropout=0.25)
    samples = [data[epoch, index] for epoch in range(50) for index in range(30)]
    dropped = torch.tensor([sample["caption_dropped"] for sample in samples])
    assert abs(dropped.double().mean() - 0.25) < 5 * (0.25 * 0.75 / 1500) ** 0.5
    timesteps = torch.stack([sample["timesteps"] for sample in samples])
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert ((counts - 150) ** 2 / 150).sum() < 40  # chi square with 9 degrees of freedom, p < 1e-5
    noise = torch.cat([sample["noise"].flatten() for sample in samples]).double()
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5
    assert abs(noise.var() - 1) < 5 * (2 / len(noise)) ** 0.5
    correlation = torch.corrcoef(torch.stack([dropped, timesteps, *noise_ends(samples)]).double())
    assert correlation.fill_diagonal_(0).abs().max() < 5 / 1500**0.5


def test_timesteps_around_the_middle():
    """A share of 0.7 is logit-normal, whose distribution function is that of the normal one at the logit."""
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.stack([draw_timestep(1000, 0.7, generator) for _ in range(20000)])
    edges = torch.arange(50, 1000, 50).double() / 1000
    below = torch.special.ndtr(torch.logit(edges) / LOGIT_DEVIATION) * 0.7 + edges * 0.3
    expected = 20000 * torch.cat([below, torch.ones(1)]).diff(prepend=torch.zeros(1))
    counts = torch.bincount(timesteps // 50, minlength=20)
    assert len(counts) == 20 and timesteps.min() >= 0
    assert ((counts - expected) ** 2 / expected).sum() < 57  # chi square with 19 degrees of freedom, p < 1e-5


def test_timesteps_are_drawn_by_sample(shards):
    """The share of the middle changes which timestep a sample gets, and nothing else of it."""
    uniform, middle = dataset(shards), dataset(shards, logit_normal_timesteps=1.0)
    before, after = uniform[3, 7], middle[3, 7]
    assert after["timesteps"] == dataset(shards, logit_normal_timesteps=1.0)[3, 7]["timesteps"] != before["timesteps"]
    assert_equal(after | {"timesteps": before["timesteps"]}, before)


def noise_ends(samples):
    return [torch.stack([sample["noise"].flatten()[place] for sample in samples]) for place in (0, -1)]


def test_streams_of_random_numbers_are_apart():
    keys = [(seed, epoch, index, which) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1) for which in Stream]
    drawn = {torch.randint(2**62, (), generator=sample_generator(*key)).item() for key in keys}
    assert len(drawn) == len(keys)


def test_random_numbers_are_those_of_runs_that_were_begun_earlier():
    assert {stream.name: int(stream) for stream in Stream} == {
        "NOISE": 0,
        "TIMESTEP": 1,
        "CROP": 2,
        "CAPTION_DROPOUT": 3,
        "ORDER": 4,
    }
    seeds = [stream_seed(0), stream_seed(1, 2, 3, Stream.NOISE), stream_seed(2**63, 0, Stream.ORDER)]
    assert seeds == [15793235383387715774, 12997252459554536576, 5686440198972674896]


def test_broken_samples_are_named_and_stand_for_nothing(folder):
    data = dataset(folder)
    assert data.broken == ["05.png: is no picture"]  # found in the headers and never drawn
    samples = [data[0, 2], data[0, 6]]
    batch = collate(samples)
    assert batch["names"] == ["02.png", "06.png"] and batch["broken"] == ["06.png: has no caption"]
    assert batch["weight"].tolist() == [1, 0]
    assert batch["captions"][1] == "" and not batch["pixel_values"][1].any()
    square = dataset(folder, sizes=[(64, 64)])
    assert square.broken == []  # no header is read
    assert square[0, 5]["broken"] == "05.png: is no picture"


def test_pictures_of_one_size_need_no_headers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_localdit.training.dataset.read_sizes", None)
    (batch,) = stream(dataset(folder, sizes=[(64, 64)], size_cache=tmp_path / "sizes.json"), 1)
    assert batch["pixel_values"].shape == (4, 3, 64, 64)


def test_sizes_with_too_few_pictures_lend_them_to_others(folder):
    data = dataset(folder, global_batch_size=9)
    places, counts = np.unique(data.bucket_of_sample[data.bucket_of_sample >= 0], return_counts=True)
    assert counts.tolist() == [9, 18, 9]  # the eight squares went to the next wider ones
    shapes = {tuple(batch["pixel_values"].shape[2:]) for batch in stream(data, 4)}
    assert shapes == {SIZES[place] for place in places}


def test_sizes_are_cached(folder, tmp_path):
    first = dataset(folder, size_cache=tmp_path / "sizes.json")
    known = json.loads((tmp_path / "sizes.json").read_text())
    assert len(known["sizes"]) == 37 and known["broken"] == first.broken
    again = dataset(folder, size_cache=tmp_path / "sizes.json")
    np.testing.assert_array_equal(again.bucket_of_sample, first.bucket_of_sample)


def test_precomputed_batches(shards):
    data = dataset(shards)
    batches = stream(data, 7)
    assert sorted(name for batch in batches for name in batch["names"]) == sorted(
        {name for batch in batches for name in batch["names"]}
    )
    for batch in batches:
        numbers = torch.tensor([int(name[-8:]) for name in batch["names"]])
        shape = (8, 8) if numbers[0] % 3 else (6, 10)
        assert batch["latents"].shape == batch["noise"].shape == (4, 4, *shape)
        assert batch["latents"].dtype == batch["prompt_embeds"].dtype == torch.float32
        assert torch.equal(batch["latents"][:, 0, 0, 0], numbers.float())
        assert batch["resolution"][0].tolist() == [shape[0] * 8, shape[1] * 8]
        assert batch["prompt_attention_mask"].sum(dim=1).tolist() == (1 + numbers % 5).tolist()
        expected = batch["prompt_attention_mask"] * numbers[:, None]
        assert torch.equal(batch["prompt_embeds"], expected[..., None].float().expand(-1, -1, 6))
        assert batch["caption_dropped"].dtype == torch.bool


def test_pictures_and_what_is_precomputed_of_them_draw_the_same(shards, tmp_path):
    for number in range(30):
        Image.new("RGB", (64, 64) if number % 3 else (80, 48)).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text("x")
    for encoded, picture in zip(stream(dataset(shards), 15), stream(dataset(tmp_path), 15)):
        for name in ("noise", "timesteps", "resolution", "aspect_ratio"):
            assert torch.equal(encoded[name], picture[name])
        assert encoded["caption_dropped"].tolist() == [caption == "" for caption in picture["captions"]]


def test_precomputed_samples_that_do_not_fit_are_broken(tmp_path):
    good = {"latents": torch.zeros(4, 8, 8), "prompt_embeds": torch.zeros(2, 6)}
    others = [
        good | {"latents": torch.zeros(16, 8, 8)},
        good | {"prompt_embeds": torch.zeros(2, 7)},
        good | {"prompt_embeds": torch.zeros(0, 6)},
        {"latents": good["latents"]},
    ]
    contents = [safetensors.torch.save(tensors) for tensors in (*others, good)]
    contents.insert(1, safetensors.torch.save(good)[:-100])
    samples = [(str(place), {"safetensors": content}) for place, content in enumerate([contents[-1], *contents[:-1]])]
    write_shard(tmp_path / "a.tar", samples)
    data = dataset(tmp_path, sizes=[(64, 64)])
    reasons = [
        "a.tar/1: has latents of shape (16, 8, 8) and embeddings of 6 channels; expected (4, 8, 8) and 6",
        "a.tar/2: holds no latents and prompt_embeds (",
        "a.tar/3: has latents of shape (4, 8, 8) and embeddings of 7 channels; expected (4, 8, 8) and 6",
        "a.tar/4: has prompt_embeds (0, 6); expected (tokens, channels)",
        "a.tar/5: holds no latents and prompt_embeds ('prompt_embeds')",
    ]
    for index, reason in enumerate(reasons, start=1):
        assert data[0, index]["broken"].startswith(reason)
    batch = collate([data[0, index] for index in (1, 2)])  # nothing that is known to be right
    assert batch["prompt_embeds"].shape == (2, 1, 6) and batch["latents"].shape == (2, 4, 8, 8)
    assert batch["weight"].tolist() == [0, 0]


@pytest.mark.parametrize("sizes", [[(64, 64)], buckets(128, 16)])
def test_samples_precomputed_otherwise_are_refused(shards, sizes):
    with pytest.raises(DataError, match="samples were precomputed at 48 x 80 pixels; expected the image size"):
        dataset(shards, sizes=sizes)


def test_too_few_samples_are_refused(folder, shards):
    with pytest.raises(DataError, match=r"the 36 usable samples do not fill one batch of 37"):
        dataset(folder, global_batch_size=37)
    with pytest.raises(DataError, match=r"the 30 usable samples do not fill one batch of 21 .* of one size"):
        dataset(shards, global_batch_size=21)


def test_precomputed_samples_that_fill_no_batch_are_told(shards, caplog):
    dataset(shards, global_batch_size=10)
    assert not caplog.records
    names = [batch["names"] for batch in stream(dataset(shards, global_batch_size=11), 2)]
    assert "10 of 30 precomputed samples are never drawn" in caplog.text
    assert all(int(name[-8:]) % 3 for batch in names for name in batch)


def test_batch_that_processes_cannot_share_is_refused(folder):
    with pytest.raises(DataError, match="3 processes cannot share batches of 4"):
        training_loader(dataset(folder), num_processes=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_numbers_of_the_run_are_left_alone(folder, num_workers):
    torch.manual_seed(0)
    stream(dataset(folder), 3, num_workers=num_workers)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
