"""What makes large models run on small machines: a text encoder read from disk as it runs, int8, a VAE in tiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_fixtures import make_components
from transformers import T5Config, T5EncoderModel

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline, cli
from diffusers_localdit.cli import main
from diffusers_localdit.png_settings import read_settings
from diffusers_localdit.precision import why_not_int8
from diffusers_localdit.streaming import stream_text_encoder

# Encodes with the streamed and with the loaded text encoder, and prints how many bytes of its own each made the
# process hold at most, looked at after every operation. Pages of files are the system's.
ENCODE = """
import json, re, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5EncoderModel
from diffusers_localdit.streaming import stream_text_encoder

def memory():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

class Peak(TorchDispatchMode):
    def __enter__(self):
        self.start = self.highest = memory()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.highest = max(self.highest, memory())
        return result

def grown(make_encoder):
    with torch.no_grad(), Peak() as peak:
        embeddings = make_encoder()(torch.arange(20)[None], attention_mask=torch.ones(1, 20))[0]
    return peak.highest - peak.start, embeddings

torch.set_num_threads(1)
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
streamed, embeddings = grown(lambda: stream_text_encoder(folder, dtype))
loaded, expected = grown(lambda: T5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype))
print(json.dumps([streamed, loaded, torch.equal(embeddings, expected), str(embeddings.dtype)]))
"""


def make_text_encoder(folder: Path, layers: int) -> T5EncoderModel:
    """In half precision and in shards, as large ones are published."""
    config = T5Config(vocab_size=100, d_model=512, d_ff=2048, num_layers=layers, num_heads=8, is_gated_act=True)
    with torch.device("meta"):
        encoder = T5EncoderModel(config)
    encoder = encoder.half().to_empty(device="cpu")
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.03, generator=torch.Generator().manual_seed(parameter.numel()))
    encoder.save_pretrained(folder / "text_encoder", max_shard_size="20MB")
    return encoder


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux tells it")
def test_streamed_text_encoder_takes_a_fraction_of_its_size(tmp_path):
    size = 4 * make_text_encoder(tmp_path, layers=12).num_parameters()
    arguments = [sys.executable, "-c", ENCODE, str(tmp_path), "float32"]
    # As for the large weights of a real text encoder, memory freed goes back to the system: by default glibc keeps
    # tensors as small as these, in holes that later ones may not fit.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stderr
    streamed, loaded, equal, dtype = json.loads(process.stdout.splitlines()[-1])
    assert (equal, dtype) == (True, "torch.float32")
    assert streamed < size / 8 < size < loaded, (streamed, size, loaded)


def test_streamed_text_encoder_in_half_precision(tmp_path):
    make_text_encoder(tmp_path, layers=1)
    dtype = torch.bfloat16
    loaded = T5EncoderModel.from_pretrained(tmp_path, subfolder="text_encoder", dtype=dtype)
    with torch.no_grad():
        embeddings = [encoder(torch.arange(9)[None])[0] for encoder in (stream_text_encoder(tmp_path, dtype), loaded)]
    assert embeddings[0].dtype == dtype and torch.equal(*embeddings)
    with pytest.raises(ValueError, match="T5 overflows in float16"):
        stream_text_encoder(tmp_path, torch.float16)


def test_streamed_text_encoder_names_a_missing_weight(tmp_path):
    make_text_encoder(tmp_path, layers=1)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 1', '"num_layers": 2'))
    with pytest.raises(OSError, match=r"text_encoder has no weight encoder\.block\.1\.layer\.0"):
        stream_text_encoder(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Makes pictures of 128 x 128 pixels."""
    folder = tmp_path_factory.mktemp("laptop")
    LocalDiTPipeline(**make_components(folder)).save_pretrained(folder / "tiny")
    return folder / "tiny"


def generate(model: Path, output: Path, *options) -> np.ndarray:
    prompt = "a red circle on a white background"  # one without background leaves that to the noise and the rounding
    arguments = ("generate", prompt, "--model", model, "--steps", 2, "--seed", 7, "--device", "cpu")
    assert main([str(argument) for argument in (*arguments, "--dtype", "float32", "--output", output, *options)]) == 0
    return np.asarray(Image.open(output), dtype=int)


def test_offload_to_disk_changes_nothing(model, tmp_path, monkeypatch):
    pipelines = []
    encode_prompt = LocalDiTPipeline.encode_prompt

    def keep_and_encode(self, *args, **kwargs):
        pipelines.append(self)
        return encode_prompt(self, *args, **kwargs)

    monkeypatch.setattr(LocalDiTPipeline, "encode_prompt", keep_and_encode)
    expected = generate(model, tmp_path / "a.png")
    streamed = generate(model, tmp_path / "b.png", "--offload", "disk")
    assert np.array_equal(expected, streamed)
    assert [{weight.device.type for weight in pipe.text_encoder.parameters()} for pipe in pipelines] == [
        {"cpu"},
        {"meta"},
    ]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.skipif(why_not_int8(torch.device("cpu")) is not None, reason="needs int8")
def test_int8_is_kept_with_the_picture(tmp_path):
    expected = generate(BUNDLED_MODEL, tmp_path / "a.png")
    rounded = generate(BUNDLED_MODEL, tmp_path / "b.png", "--dtype", "int8")
    assert read_settings(tmp_path / "b.png")["dtype"] == "int8"
    assert 0 < np.abs(rounded - expected).mean() < 30  # of two steps
    again = tmp_path / "c.png"
    assert main(["generate", "--like", str(tmp_path / "b.png"), "--output", str(again)]) == 0
    assert again.read_bytes() == (tmp_path / "b.png").read_bytes()


def test_tiles_of_the_vae(model, tmp_path, capsys):
    """A tile as large as the picture changes nothing; smaller ones see less of it, and say so in the file."""
    whole = generate(model, tmp_path / "a.png")
    assert np.array_equal(generate(model, tmp_path / "b.png", "--vae-tile", 128), whole)
    tiled = generate(model, tmp_path / "c.png", "--vae-tile", 64)
    assert tiled.shape == whole.shape and np.any(tiled != whole)
    assert read_settings(tmp_path / "c.png")["vae_tile"] == 64
    assert main(["generate", "a", "--model", str(model), "--vae-tile", "72", "--output", str(tmp_path)]) == 2
    assert "--vae-tile 72 is not a multiple of 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--offload", "disk"), "--offload disk is for CPUs, but the device is cuda"),
        (("--dtype", "int8"), "int8 is for CPUs, but the device is cuda"),
    ],
)
def test_on_an_accelerator_it_says_what_to_use(options, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "usable_device", torch.device)
    assert main(["generate", "a", "--device", "cuda", *options]) == 2
    assert message in capsys.readouterr().err
