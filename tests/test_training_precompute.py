"""Encoding for training, and `localdit precompute`: what is in the shards, and that no interruption shows in them."""

import inspect
import json
import multiprocessing
import random
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from diffusers.utils.torch_utils import get_device
from PIL import Image
from safetensors import safe_open

from diffusers_localdit import BUNDLED_MODEL, LocalDiTImg2ImgPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel
from diffusers_localdit.cli import main
from diffusers_localdit.training.buckets import buckets
from diffusers_localdit.training.dataset import TrainingDataset, training_loader
from diffusers_localdit.training.encode import encode_captions, encode_pictures, load_parts
from diffusers_localdit.training.objective import diffusion_loss, training_scheduler
from diffusers_localdit.training.pictures import decode
from diffusers_localdit.training.precompute import precompute
from diffusers_localdit.training.sources import open_source

SHAPES_RECIPE = Path(__file__).parents[1] / "examples" / "shapes"
CAPTIONS = ["A Red Circle on a white background ", "three green triangles on a black background", "A"]

# Children of this server have everything imported, so that the tests can afford many of them.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["diffusers_localdit.training.precompute"])


@pytest.fixture(scope="module")
def pipe():
    return load_parts(str(BUNDLED_MODEL), "tokenizer", "text_encoder", "vae")


def make_pictures(folder: Path, count: int, sizes=((32, 32),)) -> Path:
    """Pictures of noise, of the sizes (height, width) in turn, so that no two crops are alike."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Encoding


def test_pictures_are_encoded_as_the_pipeline_encodes_them(pipe):
    pixel_values = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    transformer = LocalDiTTransformer2DModel(num_attention_heads=1, attention_head_dim=24, num_layers=1)
    img2img = LocalDiTImg2ImgPipeline.from_pipe(pipe, transformer=transformer)
    with torch.no_grad():
        expected = img2img.encode_image(pixel_values, torch.device("cpu"))
    assert torch.equal(encode_pictures(pipe.vae, pixel_values), expected)
    half = load_parts(str(BUNDLED_MODEL), "vae", dtypes={"vae": torch.float16}).vae
    assert torch.equal(encode_pictures(half, pixel_values), expected)  # its weights are stored in float16
    assert half.dtype == torch.float16


@pytest.mark.parametrize("max_length", [120, 4])
def test_captions_are_encoded_as_the_pipeline_encodes_them(pipe, max_length):
    embeds, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, CAPTIONS, max_length)
    with torch.no_grad():
        expected, expected_mask, _, _ = pipe.encode_prompt(CAPTIONS, False, max_sequence_length=max_length)
    longest = int(expected_mask.sum(dim=1).max())
    assert embeds.shape[1] == longest <= max_length
    assert torch.equal(mask, expected_mask[:, :longest])
    real = mask.bool()
    torch.testing.assert_close(embeds[real], expected[:, :longest][real], rtol=0, atol=1e-5)


def test_a_pipeline_without_what_is_needed_is_named(tmp_path, pipe):
    with pytest.raises(ValueError, match=f"cannot load the pipeline {tmp_path}: "):
        load_parts(str(tmp_path), "vae")
    LocalDiTPipeline.from_pipe(pipe, text_encoder=None).save_pretrained(tmp_path)
    assert load_parts(str(tmp_path), "vae").vae is not None
    with pytest.raises(ValueError, match=f"the pipeline {tmp_path} has no text_encoder"):
        load_parts(str(tmp_path), "vae", "text_encoder")


# Shards


def test_shards_hold_what_training_would_encode(tmp_path, pipe):
    data = make_pictures(tmp_path / "data", 5, sizes=((40, 32), (32, 32)))
    precompute(str(data), tmp_path / "out", image_size=32, samples_per_shard=2, batch_size=2, num_workers=0)

    shards = sorted(path.name for path in (tmp_path / "out").glob("shard-*"))
    assert shards == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-{000000..000002}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(5)]
    source = open_source(str(tmp_path / "out"))
    assert source.precomputed and len(source) == 5
    for i, sample in enumerate(samples):
        tensors = safetensors.torch.load(sample["safetensors"])
        picture = Image.open(data / f"{i:04d}.png").crop((0, 4, 32, 36) if i % 2 == 0 else None)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        expected = encode_pictures(pipe.vae, pixels)[0]
        # Half a unit of the last of float16's 11 bits, and what batches change in the last bits of float32.
        torch.testing.assert_close(tensors["latents"].float(), expected, rtol=2**-11, atol=1e-5)
        caption = CAPTIONS[i % len(CAPTIONS)]
        embeds, _ = encode_captions(pipe.tokenizer, pipe.text_encoder, [caption.lower().strip()])
        torch.testing.assert_close(tensors["prompt_embeds"].float(), embeds[0], rtol=2**-11, atol=1e-5)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert sample["txt"].decode() == caption
        (tmp_path / "sample").write_bytes(sample["safetensors"])
        with safe_open(tmp_path / "sample", "pt") as file:
            assert file.metadata() == {"name": f"{i:04d}.png"}
        assert source.read(i).encoded == sample["safetensors"]

    empty = safetensors.torch.load_file(tmp_path / "out" / "empty_caption.safetensors")["prompt_embeds"]
    embeds, _ = encode_captions(pipe.tokenizer, pipe.text_encoder, [""])
    torch.testing.assert_close(empty.float(), embeds[0], rtol=2**-11, atol=1e-5)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_training_from_shards_has_the_losses_of_training_from_pictures(tmp_path, pipe, crop):
    data = make_pictures(tmp_path / "data", 12, sizes=((80, 64), (64, 64), (32, 100)))
    precompute(str(data), tmp_path / "out", image_size=64, aspect_ratio_buckets=True, crop=crop, num_workers=0)
    transformer = LocalDiTTransformer2DModel.from_pretrained(BUNDLED_MODEL, subfolder="transformer").eval()
    scheduler = training_scheduler()

    def batches(data_root):
        dataset = TrainingDataset(
            open_source(str(data_root)),
            sizes=buckets(64, step=16),
            latent_channels=4,
            spatial_scale=8,
            num_train_timesteps=1000,
            seed=0,
            crop=crop,
            global_batch_size=4,
        )
        return islice(training_loader(dataset), 3)  # the first epoch

    @torch.no_grad()
    def losses(batch, latents, embeds, mask):
        inputs = (batch[name] for name in ("resolution", "aspect_ratio"))
        return diffusion_loss(
            transformer, scheduler, latents, batch["noise"], batch["timesteps"], embeds, mask, *inputs
        )

    from_pictures, from_rounded, from_shards, sizes = [], [], [], set()
    for picture_batch, shard_batch in zip(batches(data), batches(tmp_path / "out")):
        latents = encode_pictures(pipe.vae, picture_batch["pixel_values"])
        embeds, mask = encode_captions(pipe.tokenizer, pipe.text_encoder, picture_batch["captions"])
        from_pictures.append(losses(picture_batch, latents, embeds, mask))
        from_rounded.append(losses(picture_batch, latents.half().float(), embeds.half().float(), mask))
        stored = (shard_batch[name] for name in ("latents", "prompt_embeds", "prompt_attention_mask"))
        from_shards.append(losses(shard_batch, *stored))
        sizes.add(latents.shape[-2:])
    assert len(sizes) == 2
    from_pictures, from_rounded, from_shards = map(torch.cat, (from_pictures, from_rounded, from_shards))
    # Shards are float16: the same numbers rounded likewise give the same losses but for the last bits of float32, ...
    torch.testing.assert_close(from_shards, from_rounded, rtol=1e-5, atol=0)
    # ... and half a unit in the last of float16's 11 bits, 2^-11 or 0.05% of every input, changes losses no more.
    torch.testing.assert_close(from_shards, from_pictures, rtol=2**-11, atol=0)


def test_workers_change_nothing(tmp_path):
    data = make_pictures(tmp_path / "data", 9, sizes=((32, 32), (24, 48), (70, 30)))
    settings = {"image_size": 32, "aspect_ratio_buckets": True, "crop": "random", "samples_per_shard": 5}
    precompute(str(data), tmp_path / "alone", num_workers=0, **settings)
    precompute(str(data), tmp_path / "workers", num_workers=2, **settings)
    assert files(tmp_path / "alone") == files(tmp_path / "workers")


@pytest.mark.parametrize(
    "dtype, vae_dtype", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]
)
def test_batches_are_full_and_of_one_size(tmp_path, monkeypatch, pipe, dtype, vae_dtype):
    """A VAE may overflow in float16, which is for the text encoder alone."""
    pipe.save_pretrained(tmp_path / "pipe")
    data = make_pictures(tmp_path / "data", 10, sizes=((64, 64), (64, 64), (32, 100)))
    batches = []

    def encode(vae, pixel_values):
        batches.append((vae.dtype, *pixel_values.shape))
        return encode_pictures(vae, pixel_values)

    monkeypatch.setattr("diffusers_localdit.training.precompute.encode_pictures", encode)
    monkeypatch.chdir(tmp_path)
    sizes = {"image_size": 64, "aspect_ratio_buckets": True, "batch_size": 3}
    precompute(str(data), tmp_path / "out", pipeline="pipe", dtype=dtype, num_workers=0, **sizes)
    assert sorted(shape for _, *shape in batches) == [[1, 3, 64, 64], [3, 3, 32, 96], *[[3, 3, 64, 64]] * 2]
    assert {dtype for dtype, *_ in batches} == {getattr(torch, vae_dtype)}
    # Trained with from another folder, too, the shards name what they were made with.
    assert json.loads((tmp_path / "out" / "precompute.json").read_text())["pipeline"] == str(tmp_path / "pipe")


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_and_resume(tmp_path, kills):
    """Killed at random moments and run again, the files come out as those of one run, to the byte."""
    data = make_pictures(tmp_path / "data", 100, sizes=((32, 32), (24, 48), (70, 30), (32, 32), (48, 24)))
    (data / "0007.png").write_bytes(b"no picture")
    settings = {
        "data_root": str(data),
        "image_size": 32,
        "aspect_ratio_buckets": True,
        "crop": "random",
        "samples_per_shard": 5,
        "batch_size": 3,
        "num_workers": 0,
    }

    def start(output):
        process = processes.Process(target=precompute, kwargs=settings | {"output": str(output)})
        process.start()
        return process

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    process.join()
    assert process.exitcode == 0
    expected = files(whole)
    shards = sorted(name for name in expected if name.startswith("shard"))
    assert len(shards) == 20 and len(expected) == 23
    times = [(whole / name).stat().st_mtime for name in shards]
    time_per_shard = (times[-1] - times[0]) / (len(times) - 1)

    rng = random.Random(0)
    for _ in range(kills):
        process = start(killed)
        goal = sum((killed / name).exists() for name in shards) + rng.randrange(1 + 10 // kills)
        while process.is_alive() and sum((killed / name).exists() for name in shards) < goal:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, time_per_shard))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        done = [name for name in shards if (killed / name).exists()]
        assert done == shards[: len(done)] != shards
        assert all((killed / name).read_bytes() == expected[name] for name in done)
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    assert files(killed) == expected
    assert expected["broken.txt"].startswith(b"7\t0007.png: ")


# What can go wrong


def test_other_settings_are_refused(tmp_path):
    data = make_pictures(tmp_path / "data", 2)
    precompute(str(data), tmp_path / "out", image_size=32, num_workers=0)
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match="other settings: image_size was 32 and is 48, seed was 0 and is 1;"):
        precompute(str(data), tmp_path / "out", image_size=48, seed=1, num_workers=0)
    (data / "0001.png").rename(data / "0002.png")
    with pytest.raises(ValueError, match="begun with other settings: data was"):
        precompute(str(data), tmp_path / "out", image_size=32, num_workers=0)
    assert files(tmp_path / "out") == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    data = make_pictures(tmp_path / "data", 2)
    with pytest.raises(ValueError, match=r"holds 0000.png and no precompute.json; choose a new or empty OUTPUT"):
        precompute(str(data), data, image_size=32, num_workers=0)
    assert len(files(data)) == 4


def test_settings_that_cannot_be_used_are_not_kept(tmp_path):
    data = make_pictures(tmp_path / "data", 2)
    with pytest.raises(ValueError, match="the image size is 40; expected a multiple of 16"):
        precompute(str(data), tmp_path / "out", image_size=40)
    assert not (tmp_path / "out").exists()
    out = tmp_path / "a folder" / "out"
    precompute(str(data), out, image_size=48, num_workers=0)
    with pytest.raises(ValueError, match="out is precomputed already"):
        precompute(str(out), tmp_path / "again", image_size=48)


def test_a_full_disk_leaves_whole_shards(tmp_path):
    data = make_pictures(tmp_path / "data", 6)
    arguments = {"image_size": 32, "samples_per_shard": 3, "num_workers": 0}
    precompute(str(data), tmp_path / "expected", **arguments)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-000001.tar.tmp").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot write .*shard-000001.tar: No space left on device; put it right"):
        precompute(str(data), tmp_path / "out", **arguments)
    assert files(tmp_path / "out").items() < files(tmp_path / "expected").items()
    precompute(str(data), tmp_path / "out", **arguments)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_a_name_that_is_no_utf8(tmp_path):
    data = make_pictures(tmp_path / "data", 1)
    for path in list(data.iterdir()):
        path.rename(data / f"\udcff{path.suffix}")
    precompute(str(data), tmp_path / "out", image_size=32, num_workers=0)
    (tmp_path / "sample").write_bytes(open_source(str(tmp_path / "out")).read(0).encoded)
    with safe_open(tmp_path / "sample", "pt") as file:
        assert file.metadata() == {"name": "?.png"}


def test_a_shard_that_is_gone_is_made_again(tmp_path):
    data = make_pictures(tmp_path / "data", 200)
    (data / "0001.png").write_bytes(b"no picture")
    (data / "0190.png").write_bytes(b"no picture")
    arguments = {"image_size": 32, "samples_per_shard": 50, "num_workers": 0}
    precompute(str(data), tmp_path / "out", **arguments)
    before = files(tmp_path / "out")
    for number in (1, 3):  # one with a sample that is broken
        (tmp_path / "out" / f"shard-{number:06}.tar").unlink()
    (tmp_path / "out" / "shard-000001.tar.tmp").write_bytes(b"half of it")
    with (tmp_path / "out" / "broken.txt").open("ab") as broken:
        broken.write(b"19")  # of sample 190: the process was killed while it wrote
    precompute(str(data), tmp_path / "out", **arguments)
    assert files(tmp_path / "out") == before


def test_options_of_the_command(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("diffusers_localdit.training.precompute.precompute", lambda **options: asked.append(options))
    needed = ["precompute", "data", "out", "--image-size", "32"]
    assert main(needed) == 0
    parameters = inspect.signature(precompute).parameters
    defaults = {name: each.default for name, each in parameters.items() if each.default is not inspect.Parameter.empty}
    expected = defaults | {"data_root": "data", "output": "out", "image_size": 32, "device": get_device()}
    assert asked == [expected]

    chosen = {"pipeline": "pipe", "crop": "random", "samples_per_shard": 5, "seed": 3, "batch_size": 2}
    chosen |= {"dtype": "bfloat16", "device": "cpu", "num_workers": 0}
    given = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main([*needed, "--aspect-ratio-buckets", *given]) == 0
    assert asked[1] == expected | chosen | {"aspect_ratio_buckets": True}
    assert capsys.readouterr().out.splitlines() == ["out", "out"]
    for wrong in ("--crop=none", "--seed=-1", "--dtype=int8"):
        with pytest.raises(SystemExit, match="2"):
            main([*needed, wrong])
    with pytest.raises(SystemExit, match="2"):
        main(needed[:3])


def test_more_than_a_hundredth_broken_stops(tmp_path, capsys):
    data = make_pictures(tmp_path / "data", 100)
    (data / "0003.txt").write_bytes(b"\xff")
    (data / "0060.png").write_bytes((data / "0060.png").read_bytes()[:100])
    out = tmp_path / "out"
    command = ["precompute", str(data), str(out), "--image-size", "32", "--samples-per-shard", "50"]
    assert main([*command, "--num-workers", "0"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("localdit: error: 2 samples are broken, more than 1% of the data (")
    broken = [line.split("\t") for line in (out / "broken.txt").read_text().splitlines()]
    assert [(number, reason.split(":")[0]) for number, reason in broken] == [("3", "0003.png"), ("60", "0060.png")]
    assert [path.name for path in out.glob("shard-*")] == ["shard-000000.tar"]


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    data = make_pictures(tmp_path / "data", 2)
    broken = load_parts(str(BUNDLED_MODEL), "tokenizer", "text_encoder", "vae")
    broken.vae.quant_conv.bias.data.fill_(1e6)
    broken.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"0000.png gives numbers that are not finite in float16"):
        precompute(str(data), tmp_path / "out", image_size=32, pipeline=str(tmp_path / "pipe"), num_workers=0)
    assert not list((tmp_path / "out").glob("shard-*"))


def test_the_recipe_of_shapes_writes_shards(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SHAPES_RECIPE))
    import make_dataset
    from scenes import is_held_out, leave_out, render, sample_scene

    make_dataset.main(["--output", str(tmp_path), "--pictures", "25", "--samples-per-shard", "10"])
    source = open_source(str(tmp_path))
    assert len(source) == 25
    for number in range(25):
        sample = source.read(number)
        rng = np.random.default_rng([0, number])
        scene = sample_scene(rng)
        assert sample.caption == leave_out(scene.caption, rng) and not is_held_out(scene.caption)
        assert np.array_equal(decode(sample.picture), render(scene))


def test_the_recipe_of_shapes_draws_a_style(tmp_path, monkeypatch):
    """Pictures for LoRA, whose objects all have one colour, and captions that training never saw, for validation."""
    monkeypatch.syspath_prepend(str(SHAPES_RECIPE))
    import make_dataset
    from scenes import BACKGROUNDS, COLOURS, is_held_out

    make_dataset.main(["--output", str(tmp_path), "--pictures", "8", "--colour", "purple", "--held-out"])
    source = open_source(str(tmp_path))
    for number in range(8):
        sample = source.read(number)
        assert is_held_out(sample.caption)
        counts = decode(sample.picture).getcolors(1 << 14)
        most = {colour for _, colour in sorted(counts)[-2:]}
        assert COLOURS["purple"] in most and most - {COLOURS["purple"]} <= set(BACKGROUNDS.values())
