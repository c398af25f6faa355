from collections.abc import Iterator

import pytest
from loopback_hub import LoopbackHub


@pytest.fixture(scope="session")
def loopback_hub() -> Iterator[LoopbackHub]:
    """Started once for all tests of a process; each begins with `loopback_hub.emptied()`."""
    with LoopbackHub() as hub:
        yield hub
