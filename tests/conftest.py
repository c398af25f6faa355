from collections.abc import Iterator

import pytest
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
