"""What goes wrong in a run is said in one line, and what was there before is still good."""

import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from training_inputs import (  # noqa: F401
    Training,
    arguments,
    own_process_as_before,
    rewrite_sample,
    rows,
    weights,
    write_shard,
)

from diffusers_localdit.cli import main as localdit
from diffusers_localdit.training import train
from diffusers_localdit.training.buckets import buckets
from diffusers_localdit.training.engine import BrokenSamples
from diffusers_localdit.training.train import main

pytestmark = pytest.mark.usefixtures("own_process_as_before")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("data"))


def refusal(capsys, *words) -> str:
    """The one line that a run which does not start leaves."""
    assert main([str(word) for word in words], prog="train") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: error: ")]
    return line


class TestBeforeTheFirstStep:
    def test_no_data(self, capsys):
        assert "give --data-root" in refusal(capsys, "--preset", "shapes")

    def test_empty_folder(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        message = refusal(capsys, *arguments(tmp_path / "empty", tmp_path / "run"))
        assert "empty" in message and "no pictures" in message

    def test_missing_folder(self, tmp_path, capsys):
        assert "does not exist" in refusal(capsys, *arguments(tmp_path / "none", tmp_path / "run"))

    def test_pictures_need_a_pipeline(self, tmp_path, capsys):
        for index in range(4):
            Image.new("RGB", (32, 32)).save(tmp_path / f"{index}.png")
            (tmp_path / f"{index}.txt").write_text("black")
        assert "give --pipeline" in refusal(capsys, *arguments(tmp_path, tmp_path / "run"))

    def test_text_embeddings_of_another_width(self, data, tmp_path, capsys):
        words = arguments(data, tmp_path / "run", architecture="{num_attention_heads: 2, attention_head_dim: 12}")
        message = refusal(capsys, *words)
        assert "have 8 channels, but the transformer takes 4096" in message

    def test_unknown_architecture(self, data, tmp_path, capsys):
        message = refusal(capsys, *arguments(data, tmp_path / "run", architecture="{num_lairs: 3}"))
        assert "'num_lairs'" in message

    def test_image_size_that_is_no_multiple(self, data, tmp_path, capsys):
        assert "multiple of 16" in refusal(capsys, *arguments(data, tmp_path / "run", image_size=40))

    def test_latents_of_another_size(self, data, tmp_path, capsys):
        assert "32 x 32" in refusal(capsys, *arguments(data, tmp_path / "run", image_size=64))

    def test_validation_data_of_another_kind(self, data, tmp_path, capsys):
        picture = tmp_path / "pictures" / "a.png"
        picture.parent.mkdir()
        Image.new("RGB", (32, 32)).save(picture)
        picture.with_suffix(".txt").write_text("a caption")
        words = arguments(data, tmp_path / "run", validation_root=picture.parent)
        assert "must both be precomputed, or both hold pictures" in refusal(capsys, *words)

    @pytest.mark.parametrize(
        "other, complaint",
        [
            ({"channels": 16}, r"of the validation data have 16 channels, but the transformer takes 8"),
            ({"latent_channels": 16}, r"none of the first 2 samples of .* has latents of shape \(16, 4, 4\)"),
        ],
    )
    def test_validation_data_of_another_pipeline(self, other, complaint, data, tmp_path, capsys):
        held_out = write_shard(tmp_path / "held_out", **other)
        message = refusal(capsys, *arguments(data, tmp_path / "run", validation_root=held_out))
        assert re.search(complaint, message)

    def test_half_precision_without_accelerator(self, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        message = refusal(capsys, *arguments(data, tmp_path / "run", mixed_precision="fp16"))
        assert "which fp16 needs: give --mixed-precision bf16" in message

    @pytest.mark.parametrize(
        "name, value, module", [("optimizer", "adamw_8bit", "bitsandbytes"), ("lora_rank", 4, "peft")]
    )
    def test_missing_package(self, name, value, module, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, f"{module}.optim", None)
        words = arguments(data, tmp_path / "run", **{name: value})
        if name == "lora_rank":
            words += ["--init-from", "localdit-shapes", "--architecture", "{num_attention_heads: 6}"]
        message = refusal(capsys, *words)
        assert f"needs {module}: pip install" in message

    def test_missing_matplotlib(self, data, tmp_path, capsys, monkeypatch):
        """Which nothing needs before the first validation."""
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert "needs matplotlib: pip install" in refusal(capsys, *arguments(data, tmp_path / "run"))

    def test_one_process_opens_the_data_before_the_others(self, data, tmp_path, capsys, monkeypatch):
        """Which may download it, to where the others find it then."""
        first = []

        @contextmanager
        def goes_first(accelerator):
            first.append(True)
            yield
            first.clear()

        def open_source(data_root):
            raise ValueError(f"opened {'in turn' if first else 'by all at once'}")

        monkeypatch.setattr(Accelerator, "local_main_process_first", goes_first)
        monkeypatch.setattr(train, "open_source", open_source)
        assert "opened in turn" in refusal(capsys, *arguments(data, tmp_path / "run"))

    def test_compiled_run_pads_captions_and_compiles(self, data, tmp_path, capsys, monkeypatch):
        def compile_blocks(transformer, num_sizes):
            raise ValueError(f"compiled for {num_sizes} sizes")

        monkeypatch.setattr(train, "compile_blocks", compile_blocks)
        words = arguments(data, tmp_path / "run", compile=True, text_tokens=5, aspect_ratio_buckets=True)
        sizes = len(buckets(32, 16))
        assert sizes > 1 and f"compiled for {sizes} sizes" in refusal(capsys, *words)

    @pytest.mark.parametrize(
        "error, code, message",
        [
            (KeyboardInterrupt(), 130, "interrupted; run the same command to go on"),
            (
                torch.OutOfMemoryError("CUDA"),
                2,
                "out of memory: try --gradient-checkpointing, or a smaller --batch-size",
            ),
        ],
    )
    def test_what_happens_to_a_run(self, error, code, message, data, tmp_path, capsys, monkeypatch):
        def run(*_):
            raise error

        monkeypatch.setattr(train, "train", run)
        assert main(arguments(data, tmp_path / "run"), prog="train") == code
        assert capsys.readouterr().err.startswith(f"train: error: {message}")

    def test_debug_shows_the_traceback(self, data, tmp_path, capsys):
        words = arguments(data, tmp_path / "run", image_size=40)
        assert main([*words, "--debug"], prog="train") == 2
        assert "Traceback (most recent call last)" in capsys.readouterr().err

    def test_missing_tracker(self, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("diffusers_localdit.training.engine.get_available_trackers", list)
        message = refusal(capsys, *arguments(data, tmp_path / "run", tracker="wandb"))
        assert "needs wandb: pip install wandb" in message

    @pytest.mark.parametrize(
        "installed, name, value, expected",
        [
            (False, "seed", 0, "asks for DeepSpeed: pip install deepspeed"),
            (True, "optimizer", "muon", "take adamw, or FSDP"),
            (True, "mixed_precision", "fp16", "with DeepSpeed give --mixed-precision bf16 or no"),
        ],
    )
    def test_deepspeed(self, installed, name, value, expected, data, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setattr("diffusers_localdit.training.engine.is_deepspeed_available", lambda: installed)
        assert expected in refusal(capsys, *arguments(data, tmp_path / "run", **{name: value}))


def test_captions_longer_than_all_are_padded_to(data, tmp_path):
    """Which a compiled run notices before it compiles anything, and no other run pads them."""
    message = Training(data, tmp_path / "run", compile=True, text_tokens=2).error()
    assert "a caption has 3 tokens, more than text_tokens: 2; give a larger --text-tokens" in message
    Training(data, tmp_path / "plain", text_tokens=2, steps=1).finish()


def test_command_and_script_say_the_same(capsys):
    """`localdit train` and `examples/train.py` are one thing."""
    assert localdit(["train", "--preset", "nothing"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("localdit: error: there is no preset 'nothing'")


def test_diverged_run_stops_before_it_spoils_anything(data, tmp_path):
    """With a learning rate of 1e30 the weights of the third step are beyond all numbers."""
    output = tmp_path / "run"
    message = Training(data, output, learning_rate=1e30, checkpoint_every=1, max_grad_norm=1e9).error()
    step = len(rows(output)) + 1
    assert f"at step {step} the loss is" in message and "nan" in message
    assert "shard-000000.tar/0000" in message
    assert f"the last good checkpoint is {output / 'checkpoints' / f'step_{step - 1:08d}'}" in message
    assert weights(output, step - 1)
    assert not (output / "checkpoints" / f"step_{step:08d}").exists()


def test_sample_that_is_to_blame_is_named(data, tmp_path):
    """One sample has latents that are not finite; the others of its batch are not accused."""
    poisoned = tmp_path / "data"
    rewrite_sample(data, poisoned, "000007", latents=torch.full((4, 4, 4), torch.inf).half())
    message = Training(poisoned, tmp_path / "run").error()
    assert "with the samples shard-000000.tar/000007;" in message


def test_more_than_one_in_a_hundred_broken(data, tmp_path):
    broken = tmp_path / "data"
    rewrite_sample(data, broken, "000003", prompt_embeds=torch.zeros(0, 8).half())
    message = Training(broken, tmp_path / "run").error()
    assert "1 of 24 samples are broken, more than 1%" in message and "000003" in message
    assert "000003" in (tmp_path / "run" / "broken.txt").read_text()


def test_broken_samples_have_any_names(tmp_path):
    """Those of files are bytes."""
    for _ in range(2):  # in a second run, too
        broken = BrokenSamples(tmp_path / "broken.txt", samples=200)
        broken.add(Accelerator(), ["\udcff.jpg: is no picture"])
        broken.add(SimpleNamespace(is_main_process=False), ["a.jpg: is in the file of another process"])
    assert (tmp_path / "broken.txt").read_bytes() == b"\xff.jpg: is no picture\n"


def test_few_broken_are_named_and_left_out(tmp_path):
    data = write_shard(tmp_path / "good", samples=120)
    rewrite_sample(data, tmp_path / "data", "000003", prompt_embeds=torch.zeros(0, 8).half())
    output = tmp_path / "run"
    Training(tmp_path / "data", output, steps=30, validate_every=30, checkpoint_every=30).finish()
    assert len((output / "broken.txt").read_text().splitlines()) == 1
    assert all(row["loss"] > 0 for row in rows(output))


@pytest.mark.parametrize(
    "damaged", ["checkpoint.json", "transformer/diffusion_pytorch_model.safetensors", "state/optimizer.bin"]
)
def test_a_damaged_checkpoint_is_named(damaged, data, tmp_path):
    """As one that was copied in part."""
    output = tmp_path / "run"
    Training(data, output, steps=4, checkpoint_every=2).finish()
    path = output / "checkpoints" / "step_00000004" / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = Training(data, output).error()
    assert f"{output / 'checkpoints' / 'step_00000004'} cannot be read" in message
    assert f"remove it to go on from {output / 'checkpoints' / 'step_00000002'}" in message


def test_full_disk(data, tmp_path):
    """A checkpoint that does not fit is not there at all; the one before it is whole, and the run can go on."""
    output = tmp_path / "run"
    Training(data, output, steps=2).finish()
    (model,) = output.glob("checkpoints/*/transformer/diffusion_pytorch_model.safetensors")
    message = Training(data, output, size_limit=model.stat().st_size // 2).error()
    assert "cannot write the checkpoint of step 4" in message and "make room" in message
    assert f"the last good one is {output / 'checkpoints' / 'step_00000002'}" in message
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000002"]
    Training(data, output).finish()
    assert [row["step"] for row in rows(output)] == list(range(1, 9))
