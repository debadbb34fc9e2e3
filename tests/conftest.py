"""One Ray for all tests that need it, since starting it takes seconds; and no test is timed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from actors.session import ClusterSpec, RaySession, ray_session

# How long an example takes says more about the machine than about the code.
settings.register_profile("qdist", deadline=None)
settings.load_profile("qdist")


@pytest.fixture(scope="session")
def cluster() -> Iterator[RaySession]:
    """A local Ray with two CPUs, which every pool and command of this process then uses."""
    with ray_session(ClusterSpec(address=None, n_workers=2, cpus_per_worker=1)) as session:
        yield session
