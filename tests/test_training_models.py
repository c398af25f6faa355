"""Which weights a run starts from, what it trains of them, and how much memory that takes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.profiler import ProfilerActivity, profile
from training_inputs import (  # noqa: F401
    Training,
    assert_same_run,
    own_process_as_before,
    rows,
    weights,
    write_shard,
)

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline, LocalDiTTransformer2DModel
from diffusers_localdit.training.models import build_transformer, compile_blocks, memory_estimate
from diffusers_localdit.training.settings import TrainingSettings
from diffusers_localdit.training.train import main

pytestmark = pytest.mark.usefixtures("own_process_as_before")
TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "caption_channels": 8}


@pytest.fixture
def stage(tmp_path) -> Path:
    """A transformer as the first stage leaves it, for 512 pixels."""
    torch.manual_seed(0)
    LocalDiTTransformer2DModel(**TINY, sample_size=64).save_pretrained(tmp_path / "stage")
    return tmp_path / "stage"


class TestStages:
    @pytest.mark.parametrize(
        "pixels, sample_size, scale", [(256, 32, 1), (512, 64, 1), (1024, 128, 2), (2048, 256, 4)]
    )
    def test_sample_size_and_position_scale(self, pixels, sample_size, scale):
        model = build_transformer(TrainingSettings(image_size=pixels, architecture=TINY))
        assert (model.config.sample_size, model.interpolation_scale) == (sample_size, scale)

    def test_next_stage_keeps_all_weights(self, stage):
        first = LocalDiTTransformer2DModel.from_pretrained(stage)
        second = build_transformer(TrainingSettings(image_size=1024, init_from=str(stage)))
        assert (second.config.sample_size, second.interpolation_scale) == (128, 2)
        assert second.config.use_global_context
        ours, theirs = second.state_dict(), first.state_dict()
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
        assert any("global_context" in name for name in ours)

    def test_averaged_weights_come_first(self, stage):
        torch.manual_seed(1)
        average = LocalDiTTransformer2DModel(**TINY, sample_size=64)
        average.save_pretrained(stage, variant="ema")
        model = build_transformer(TrainingSettings(image_size=512, init_from=str(stage)))
        assert model.proj_out.weight.equal(average.proj_out.weight)

    def test_bundled_pipeline(self):
        model = build_transformer(TrainingSettings(image_size=256, init_from="localdit-shapes"))
        bundled = LocalDiTTransformer2DModel.from_pretrained(BUNDLED_MODEL / "transformer", dtype=torch.float32)
        assert model.config.sample_size == 32 and model.proj_out.weight.equal(bundled.proj_out.weight)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_architecture_has_to_fit(self, stage):
        settings = TrainingSettings(init_from=str(stage), architecture={"num_layers": 3})
        for changes in ({}, {"lora_rank": 2}):
            with pytest.raises(ValueError, match=r"num_layers: 3, but the weights of .* have 2"):
                build_transformer(settings.replace(**changes))

    def test_nothing_to_start_from(self, tmp_path):
        with pytest.raises(ValueError, match="holds no transformer"):
            build_transformer(TrainingSettings(init_from=str(tmp_path)))
        with pytest.raises(ValueError, match="give --init-from or --pipeline"):
            build_transformer(TrainingSettings(lora_rank=4))

    def test_broken_weights(self, stage):
        (stage / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
        with pytest.raises(ValueError, match="cannot load the transformer of"):
            build_transformer(TrainingSettings(init_from=str(stage)))


def test_lora_trains_the_adapters_alone(stage):
    model = build_transformer(TrainingSettings(init_from=str(stage), lora_rank=3, image_size=1024))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    for layer in ("attn.to_q", "attn.global_context.to_v", "attn.to_out.0", "cross_attn.to_k"):
        assert f"transformer_blocks.1.{layer}.lora_A.default.weight" in trained
    assert model.config.sample_size == 64  # it will be loaded into a model of this size


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(draw.integers(0, 256, (140, 128 + 10 * index, 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )
        (folder / f"{index}.txt").write_text("a red circle on a white background")
    return folder


def test_lora_on_pictures_end_to_end(pictures, tmp_path):
    """Trained in two parts as in one; loaded by the pipeline; the validation pictures are the pipeline's own."""
    settings = {
        **{"pipeline": "localdit-shapes", "lora_rank": 4, "image_size": 128, "batch_size": 2, "architecture": "{}"},
        **{"learning_rate": 1e-2, "warmup_steps": 0, "crop": "random", "aspect_ratio_buckets": None},
    }
    prompt = "a blue square on a white background"
    words = {name: value for name, value in settings.items() if value is not None}
    words |= {"validation_prompts": prompt, "validate_every": 4, "checkpoint_every": 2}
    Training(pictures, tmp_path / "whole", steps=4, **words).finish()
    Training(pictures, tmp_path / "parts", steps=2, **words).finish()
    Training(pictures, tmp_path / "parts", steps=4, **words).finish()
    checkpoints = [tmp_path / run / "checkpoints" / "step_00000004" for run in ("whole", "parts")]
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.ema.safetensors"):
        whole, parts = (load_file(checkpoint / name) for checkpoint in checkpoints)
        assert whole.keys() == parts.keys() and all(whole[key].equal(parts[key]) for key in whole)
    assert max(path.stat().st_size for path in checkpoints[0].rglob("*.safetensors")) < 1e6  # without the base
    assert rows(tmp_path / "whole")[-1]["loss"] > 0

    pipe = LocalDiTPipeline.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": prompt, "num_inference_steps": 20}
    before = np.asarray(pipe(**arguments, generator=torch.Generator().manual_seed(0)).images[0])
    pipe.load_lora_weights(checkpoints[0], weight_name="pytorch_lora_weights.ema.safetensors")
    after = np.asarray(pipe(**arguments, generator=torch.Generator().manual_seed(0)).images[0], dtype=int)
    validated = np.asarray(Image.open(tmp_path / "whole" / "samples" / "step_00000004.png"), dtype=int)
    assert abs(after - before.astype(int)).max() > 20
    assert abs(after - validated).max() <= 2  # padding the text to 120 tokens changes the last digits


def kept_by_a_forward_pass(settings: TrainingSettings) -> int:
    """Bytes that are allocated after a forward pass and were not before it."""
    transformer = build_transformer(settings)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    side, batch_size = settings.image_size // 8, settings.batch_size
    inputs = {
        "hidden_states": torch.randn(batch_size, 4, side, side),
        "encoder_hidden_states": torch.randn(batch_size, settings.text_tokens, transformer.config.caption_channels),
        "timestep": torch.zeros(batch_size),
        "added_cond_kwargs": {"resolution": torch.ones(batch_size, 2), "aspect_ratio": torch.ones(batch_size, 1)},
        "encoder_attention_mask": torch.ones(batch_size, settings.text_tokens),
    }
    transformer(**inputs)  # what is computed once for a size is no part of a pass
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = transformer(**inputs)
    assert output.sample.requires_grad  # and lives until here
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


class TestMemory:
    def estimate(self, **changes) -> dict[str, int]:
        settings = TrainingSettings(**({"image_size": 256, "architecture": TINY, "mixed_precision": "no"} | changes))
        return memory_estimate(build_transformer(settings), settings)

    def test_weights_and_what_goes_with_them(self):
        count = LocalDiTTransformer2DModel(**TINY).num_parameters()
        estimate = self.estimate()
        expected = {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "EMA": 4 * count}
        assert {name: estimate[name] for name in expected} == expected
        assert self.estimate(ema_decay=None)["EMA"] == 0

    def test_activations(self):
        """They grow with the batch, and half precision halves them."""
        once, twice = self.estimate(batch_size=4)["activations"], self.estimate(batch_size=8)["activations"]
        assert twice == pytest.approx(2 * once, rel=0.05)
        assert self.estimate(batch_size=4, mixed_precision="bf16")["activations"] == once // 2

    def test_activations_are_what_a_forward_pass_keeps(self):
        """With checkpointing, what it keeps and one block, which is computed again in the backward pass."""
        architecture = TINY | {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 4}
        arguments = {"architecture": architecture, "batch_size": 4}
        plain, checkpointed = (
            kept_by_a_forward_pass(TrainingSettings(image_size=256, gradient_checkpointing=on, **arguments))
            for on in (False, True)
        )
        block = (plain - checkpointed) / architecture["num_layers"]
        assert checkpointed < 0.2 * plain
        # Attention keeps other tensors on a CPU than on the accelerators that the estimate is for.
        assert self.estimate(**arguments)["activations"] == pytest.approx(plain, rel=0.15)
        estimate = self.estimate(gradient_checkpointing=True, **arguments)["activations"]
        assert estimate == pytest.approx(checkpointed + block, rel=0.2)

    def test_lora(self, stage):
        estimate = self.estimate(init_from=str(stage), lora_rank=2)
        assert 0 < estimate["optimizer"] < estimate["weights"]


def test_dry_run(tmp_path, capsys):
    data = write_shard(tmp_path / "data")
    words = ["--preset", "shapes", "--data-root", data, "--output", tmp_path / "run", "--image-size", "32"]
    words += ["--batch-size", "4", "--architecture", "{caption_channels: 8}", "--dry-run"]
    assert main([str(word) for word in words], prog="train") == 0
    said = capsys.readouterr().out
    assert "learning_rate: 0.0015" in said and f"data_root: {data}" in said
    assert "24, of them broken 0" in said and "20,000, in an epoch 6.0" in said
    count = LocalDiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=24, num_layers=6, caption_channels=8
    ).num_parameters()
    assert f"{count:,}, of them trained {count:,}" in said and "GB" in said
    assert not list((tmp_path / "run").glob("checkpoints"))


def test_accumulated_batches_and_the_options_of_the_recipe(tmp_path):
    data = write_shard(tmp_path / "data")
    once = {"steps": 1, "validation_samples": 0}
    Training(data, tmp_path / "plain", **once).finish()
    Training(data, tmp_path / "halves", **once, batch_size=2, gradient_accumulation_steps=2).finish()
    mixed = {"mixed_precision": "bf16", "noise_offset": 0.1, "snr_gamma": 0.01, "tracker": "tensorboard"}
    Training(data, tmp_path / "mixed", **once, **mixed).finish()
    (plain,), (halves,), (mixed,) = (rows(tmp_path / name) for name in ("plain", "halves", "mixed"))
    # The samples are not those of a batch of four, but at the start the loss is the variance of the noise for all.
    assert plain["loss"] == pytest.approx(1, abs=0.1) and halves["loss"] == pytest.approx(1, abs=0.1)
    assert mixed["loss"] < 0.5  # of most timesteps min-SNR leaves little
    (events,) = (tmp_path / "mixed").rglob("localdit/events.out.tfevents*")
    tracked = EventAccumulator(str(events)).Reload()
    for name in ("loss", "gradient_norm", "learning_rate"):
        (event,) = tracked.Scalars(name)
        assert event.step == 1 and event.value == pytest.approx(mixed[name])
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "mixed", 1).values())


def test_average_is_that_of_the_weights_after_each_step(tmp_path):
    data, steps = write_shard(tmp_path / "data"), range(1, 5)
    torch.manual_seed(0)
    start = LocalDiTTransformer2DModel(**TINY, sample_size=4)
    start.save_pretrained(tmp_path / "stage")
    settings = {"steps": 4, "warmup_steps": 0, "checkpoint_every": 1, "keep_checkpoints": 4}
    Training(data, tmp_path / "run", init_from=tmp_path / "stage", **settings).finish()
    average = EMAModel(start.parameters(), decay=0.9)
    for step in steps:
        start.load_state_dict(weights(tmp_path / "run", step))
        average.step(start.parameters())
        saved = weights(tmp_path / "run", step, ".ema")
        for (name, _), expected in zip(start.named_parameters(), average.shadow_params, strict=True):
            assert saved[name].equal(expected), (name, step)


def test_without_average(tmp_path):
    """Stopped and resumed, too."""
    data, settings = write_shard(tmp_path / "data"), {"ema_decay": "none", "validate_every": 4}
    Training(data, tmp_path / "averaged", steps=4, validate_every=4).finish()
    Training(data, tmp_path / "whole", steps=4, **settings).finish()
    for steps in (2, 4):
        Training(data, tmp_path / "parts", steps=steps, **settings).finish()
    checkpoints = [tmp_path / run / "checkpoints" / "step_00000004" for run in ("averaged", "whole", "parts")]
    names = [[path.name for path in sorted(checkpoint.rglob("*.safetensors"))] for checkpoint in checkpoints]
    name = "diffusion_pytorch_model.safetensors"
    assert names == [["diffusion_pytorch_model.ema.safetensors", name], [name], [name]]
    averaged, whole, parts = (weights(tmp_path / run, 4) for run in ("averaged", "whole", "parts"))
    assert all(averaged[name].equal(whole[name]) and parts[name].equal(whole[name]) for name in whole)
    model = build_transformer(TrainingSettings(init_from=str(tmp_path / "parts"), image_size=32))
    assert model.proj_out.weight.equal(whole["proj_out.weight"])


def test_gradients_without_a_limit(tmp_path):
    data = write_shard(tmp_path / "data")
    settings = {"steps": 3, "warmup_steps": 0, "validate_every": 3}
    for limit in (0.1, 1e9, "none"):
        Training(data, tmp_path / str(limit), max_grad_norm=limit, **settings).finish()
    assert rows(tmp_path / "none")[0]["gradient_norm"] > 0.1
    assert_same_run(tmp_path / "none", tmp_path / "1000000000.0", step=3)
    assert (tmp_path / "none" / "metrics.jsonl").read_bytes() != (tmp_path / "0.1" / "metrics.jsonl").read_bytes()


def test_gradient_norm_that_is_not_finite_stops(tmp_path):
    """Of a loss that still is."""
    data = write_shard(tmp_path / "data")
    torch.manual_seed(0)
    model = LocalDiTTransformer2DModel(**TINY, sample_size=4)
    with torch.no_grad():
        model.proj_out.weight *= 1e17  # the square of a gradient is more than float32 holds
    model.save_pretrained(tmp_path / "stage")
    message = Training(data, tmp_path / "run", init_from=tmp_path / "stage").error()
    loss, norm = re.search("the loss is (.*) and the norm of the gradient (.*), with the batch", message).groups()
    assert 1e30 < float(loss) < 1e38 and norm == "inf"


@pytest.mark.parametrize("on", [True, False])
def test_gradient_checkpointing_is_what_the_settings_say(on):
    model = build_transformer(TrainingSettings(architecture=TINY, gradient_checkpointing=on))
    assert model.is_gradient_checkpointing is on and model.training


def test_blocks_are_compiled_with_room_for_all_sizes(monkeypatch):
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 10)
    model = build_transformer(TrainingSettings(architecture=TINY))
    compile_blocks(model, num_sizes=5)
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    assert torch._dynamo.config.recompile_limit == 8 + 4 * 5
    compile_blocks(model, num_sizes=1)
    assert torch._dynamo.config.recompile_limit == 8 + 4 * 5


def test_gradient_checkpointing_changes_nothing(tmp_path):
    data = write_shard(tmp_path / "data")
    settings = {"steps": 3, "warmup_steps": 0, "validate_every": 3}
    Training(data, tmp_path / "plain", **settings).finish()
    Training(data, tmp_path / "saving", gradient_checkpointing=True, **settings).finish()
    assert_same_run(tmp_path / "saving", tmp_path / "plain", step=3)


@pytest.mark.slow
def test_compiled_run_follows(tmp_path):
    data = write_shard(tmp_path / "data")
    settings = {"steps": 3, "warmup_steps": 0}
    Training(data, tmp_path / "plain", **settings).finish()
    Training(data, tmp_path / "compiled", compile=True, **settings).finish()
    compiled, plain = rows(tmp_path / "compiled"), rows(tmp_path / "plain")
    assert len(compiled) == len(plain)
    for ours, theirs in zip(compiled, plain):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert weights(tmp_path / "compiled", 3).keys() == weights(tmp_path / "plain", 3).keys()
