"""One Ray for all tests that need it: starting it takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors.session import ClusterSpec, RaySession, ray_session


@pytest.fixture(scope="session")
def cluster() -> Iterator[RaySession]:
    """A local Ray with two CPUs, which every pool and command of this process then uses."""
    with ray_session(ClusterSpec(address=None, n_workers=2, cpus_per_worker=1)) as session:
        yield session
