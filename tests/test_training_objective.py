"""The training objective against the equations it is named after."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusers_localdit import LocalDiTTransformer2DModel
from diffusers_localdit.training.objective import (
    diffusion_loss,
    initialize_weights,
    min_snr_weight,
    offset_noise,
    p2_weight,
    training_scheduler,
)
from diffusers_localdit.training.settings import TrainingSettings
from diffusers_localdit.training.train import build_schedule


def tiny_transformer() -> LocalDiTTransformer2DModel:
    torch.manual_seed(0)
    return LocalDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, caption_channels=8, sample_size=8
    )


def batch(size: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(size, 4, 8, 8, generator=generator),
        "noise": torch.randn(size, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([0, 500, 999])[:size],
        "prompt_embeds": torch.randn(size, 5, 8, generator=generator),
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])[:size],
        "resolution": torch.full((size, 2), 64.0),
        "aspect_ratio": torch.ones(size, 1),
    }


def test_noise_schedule_is_that_of_the_original():
    """A signal of 0.9999 at timestep 0, and next to none at 999: not the other way round."""
    inputs = batch()
    noisy = training_scheduler().add_noise(inputs["latents"], inputs["noise"], inputs["timesteps"])
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[inputs["timesteps"]].view(-1, 1, 1, 1)
    expected = signal.sqrt() * inputs["latents"] + (1 - signal).sqrt() * inputs["noise"]
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-6)
    ddim = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")  # the original's training code
    torch.testing.assert_close(noisy, ddim.add_noise(inputs["latents"], inputs["noise"], inputs["timesteps"]))


class Recorder(nn.Module):
    """Predicts a fixed share of the noisy latents and remembers what it was given."""

    def forward(self, hidden_states, **inputs):
        self.inputs = inputs
        return type("Output", (), {"sample": hidden_states / 2})


def test_loss_is_the_squared_error_of_each_sample():
    inputs, scheduler, model = batch(), training_scheduler(), Recorder()
    losses = diffusion_loss(model, scheduler, **inputs)
    noisy = scheduler.add_noise(inputs["latents"], inputs["noise"], inputs["timesteps"])
    for i, loss in enumerate(losses):
        assert loss.item() == pytest.approx((noisy[i] / 2 - inputs["noise"][i]).square().mean().item(), rel=1e-6)
    assert model.inputs["timestep"].equal(inputs["timesteps"])
    assert model.inputs["encoder_hidden_states"].equal(inputs["prompt_embeds"])
    assert model.inputs["encoder_attention_mask"].equal(inputs["prompt_attention_mask"])
    assert model.inputs["added_cond_kwargs"]["resolution"].equal(inputs["resolution"])
    assert model.inputs["added_cond_kwargs"]["aspect_ratio"].equal(inputs["aspect_ratio"])


def test_loss_is_float32_whatever_the_model_computes_in():
    inputs = batch()
    model = tiny_transformer()
    exact = diffusion_loss(model, training_scheduler(), **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        losses = diffusion_loss(model, training_scheduler(), **inputs)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.02, atol=0)  # bfloat16 has 8 bits


def test_samples_of_a_batch_do_not_mix():
    inputs, model = batch(), tiny_transformer()
    together = diffusion_loss(model, training_scheduler(), **inputs)
    alone = [
        diffusion_loss(model, training_scheduler(), **{name: tensor[i : i + 1] for name, tensor in inputs.items()})
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_gradient_against_finite_differences():
    inputs, model = batch(size=1), tiny_transformer().double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    weight = model.transformer_blocks[0].attn.to_q.weight

    def loss() -> torch.Tensor:
        # In double throughout: `diffusion_loss` itself answers in float32, which differences would be lost in.
        noisy = training_scheduler().add_noise(inputs["latents"], inputs["noise"], inputs["timesteps"])
        sample = model(
            noisy,
            encoder_hidden_states=inputs["prompt_embeds"],
            timestep=inputs["timesteps"],
            added_cond_kwargs={"resolution": inputs["resolution"], "aspect_ratio": inputs["aspect_ratio"]},
            encoder_attention_mask=inputs["prompt_attention_mask"],
        ).sample
        return (sample - inputs["noise"]).square().mean()

    diffusion_loss(model, training_scheduler(), **inputs).sum().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        weight += 1e-3 * direction
        above = loss()
        weight -= 2e-3 * direction
        below = loss()
    slope = ((above - below) / 2e-3).item()
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)


def test_every_parameter_learns():
    """None is left out of the computation: all get a gradient once the zeros of the start are gone."""
    model = tiny_transformer()
    diffusion_loss(model, training_scheduler(), **batch()).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@given(gamma=st.floats(0.01, 20))
def test_min_snr_weight(gamma):
    scheduler = training_scheduler()
    timesteps = torch.arange(1000)
    weight = min_snr_weight(scheduler, timesteps, gamma)
    signal = scheduler.alphas_cumprod.double()
    snr = signal / (1 - signal)
    expected = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64)) / snr
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=0)
    assert (weight <= 1).all() and weight[-1] == 1  # the noisiest keep their weight


def test_min_snr_weight_scales_the_loss():
    inputs, model, scheduler = batch(), Recorder(), training_scheduler()
    plain = diffusion_loss(model, scheduler, **inputs)
    weighted = diffusion_loss(model, scheduler, **inputs, snr_gamma=5.0)
    torch.testing.assert_close(weighted, plain * min_snr_weight(scheduler, inputs["timesteps"], 5.0))
    assert weighted[0] < plain[0] and weighted[2] == plain[2]


def test_p2_weight_scales_the_loss():
    inputs, model, scheduler = batch(), Recorder(), training_scheduler()
    plain = diffusion_loss(model, scheduler, **inputs)
    weighted = diffusion_loss(model, scheduler, **inputs, p2_gamma=0.4)
    signal = scheduler.alphas_cumprod[inputs["timesteps"]].double()
    torch.testing.assert_close((weighted / plain).double(), ((1 - signal) / signal) ** 0.4, rtol=1e-4, atol=0)
    assert weighted[0] < plain[0] and weighted[2] > plain[2]


def test_p2_weight_evens_out_the_errors_of_a_trained_model():
    """
    The mean squared error of the latents that a good checkpoint of localdit-shapes predicts, as it was measured. With
    the weight of its preset no timestep counts for more than twice another one; without, for up to sixteen times.
    """
    measured = {50: 0.0021, 150: 0.0056, 250: 0.0118, 350: 0.0231, 450: 0.0569, 550: 0.1415, 650: 0.3148}
    scheduler, timesteps = training_scheduler(), torch.tensor(list(measured))
    signal = scheduler.alphas_cumprod[timesteps]
    errors = torch.tensor(list(measured.values())) * signal / (1 - signal)  # of the noise
    assert 15 < errors.max() / errors.min() < 17
    weighted = errors * p2_weight(scheduler, timesteps, 0.333)
    assert weighted.max() / weighted.min() < 2


def test_offset_noise_has_the_distribution_of_an_added_offset():
    """Variance of a channel's mean: 1 / (h w) + offset^2. What is left of each channel is the same white noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5000, 4, 3, 8, generator=generator)
    shifted = offset_noise(noise, 0.3)
    # The sample variance of 20,000 normal numbers is within 5 of its own standard deviations, sqrt(2 / n) of it.
    expected = 1 / 24 + 0.3**2
    assert shifted.mean(dim=(2, 3)).var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / 20000))
    torch.testing.assert_close(
        shifted - shifted.mean(dim=(2, 3), keepdim=True), noise - noise.mean(dim=(2, 3), keepdim=True)
    )
    assert offset_noise(noise, 0.0) is noise


def test_plateau_and_decay():
    """Warm-up, plateau, linear decay to zero at the last step; more steps make a longer plateau."""

    def rates(steps: int) -> list[float]:
        recipe = {"lr_schedule": "warmup_stable_decay", "warmup_steps": 2, "decay_steps": 4, "learning_rate": 1.0}
        settings = TrainingSettings(steps=steps, **recipe)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
        schedule, found = build_schedule(settings, optimizer), []
        for _ in range(steps + 1):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    assert rates(8) == [0, 0.5, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates(11) == [0, 0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_initial_weights():
    """The model starts by predicting zero, blind to the text, and with PixArt's spreads."""
    model = tiny_transformer()
    initialize_weights(model)
    inputs = batch()
    losses = diffusion_loss(model, training_scheduler(), **inputs)
    torch.testing.assert_close(losses, inputs["noise"].square().mean(dim=(1, 2, 3)))
    for block in model.transformer_blocks:
        assert not block.cross_attn.to_out[0].weight.any()
        assert block.attn.global_context.to_k.weight.abs().max() <= math.sqrt(6 / 48)  # Xavier's bound, 24 in, 24 out
        assert not block.attn.to_q.bias.any()
    patches = model.pos_embed.proj.weight  # a linear of 2 x 2 pixels of 4 channels
    assert 0.9 < patches.abs().max() / math.sqrt(6 / (16 + 24)) <= 1
    embedder = model.adaln_single.linear.weight
    assert embedder.std().item() == pytest.approx(0.02, rel=0.1)
