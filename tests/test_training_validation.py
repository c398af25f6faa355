"""The validation loss: of which samples, noise and timesteps it is the mean, whatever a run's settings are."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from training_inputs import CHANNELS, own_process_as_before, rewrite_sample, write_shard  # noqa: F401

from diffusers_localdit import LocalDiTTransformer2DModel
from diffusers_localdit.training.buckets import buckets
from diffusers_localdit.training.conditioning import Conditioning
from diffusers_localdit.training.objective import training_scheduler
from diffusers_localdit.training.settings import TrainingSettings
from diffusers_localdit.training.sources import open_source
from diffusers_localdit.training.train import build_dataset, build_validation_dataset
from diffusers_localdit.training.validation import validation_loss

pytestmark = pytest.mark.usefixtures("own_process_as_before")
SAMPLES = 4


@pytest.fixture
def data(tmp_path) -> Path:
    """The second sample is broken."""
    write_shard(tmp_path / "whole", samples=6)
    rewrite_sample(tmp_path / "whole", tmp_path / "data", "000001", prompt_embeds=torch.zeros(0, CHANNELS).half())
    return tmp_path / "data"


@pytest.fixture
def transformer() -> LocalDiTTransformer2DModel:
    torch.manual_seed(0)
    return LocalDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, caption_channels=CHANNELS
    )


def test_what_the_settings_say_of_the_data(monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers_localdit.training.train.TrainingDataset", lambda *args, **options: (args, options))
    said = {"seed": 3, "crop": "random", "caption_dropout": 0.2, "logit_normal_timesteps": 0.5}
    settings = TrainingSettings(
        output=str(tmp_path), image_size=64, aspect_ratio_buckets=True, architecture={"in_channels": 16}, **said
    )
    of_the_model = {"latent_channels": 16, "spatial_scale": 8, "num_train_timesteps": 1000}
    arguments, options = build_dataset(settings, "a source", 12)
    assert arguments == ("a source", buckets(64, 16))
    assert options == said | of_the_model | {"global_batch_size": 12, "size_cache": tmp_path / "sizes.json"}


@pytest.mark.parametrize("changes", [{}, {"seed": 7, "caption_dropout": 1.0, "crop": "random", "noise_offset": 0.5}])
@torch.no_grad()
def test_is_the_mean_error_of_fixed_noise_on_the_first_samples(changes, data, transformer, tmp_path):
    settings = TrainingSettings(
        data_root=str(data),
        output=str(tmp_path / "run"),
        image_size=32,
        architecture={"caption_channels": CHANNELS},
        validation_samples=SAMPLES,
        **changes,
    )
    source, scheduler = open_source(settings.data_root), training_scheduler()
    dataset = build_validation_dataset(settings, source)
    conditioning = Conditioning(None, settings.data_root, True, [], tmp_path / "prompts", torch.device("cpu"))
    loss = validation_loss(Accelerator(cpu=True), transformer, scheduler, conditioning, dataset, SAMPLES)

    fixed = build_dataset(
        TrainingSettings(data_root=str(data), output=str(tmp_path), image_size=32, seed=0), source, 1
    )
    errors = []
    for index in (0, 2, 3):
        sample = fixed[0, index]
        for timestep in range(50, 1000, 100):
            noisy = scheduler.add_noise(sample["latents"], sample["noise"], torch.tensor([timestep]))
            predicted = transformer(
                noisy[None],
                encoder_hidden_states=sample["prompt_embeds"][None],
                timestep=torch.tensor([timestep]),
                added_cond_kwargs={"resolution": torch.tensor([[32.0, 32.0]]), "aspect_ratio": torch.ones(1, 1)},
            ).sample[0, :4]
            errors.append(F.mse_loss(predicted, sample["noise"]))
    assert loss == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
