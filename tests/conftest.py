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
