"""One Ray for all tests of the actors: starting it takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors.session import ClusterSpec, RaySession, ray_session


@pytest.fixture(scope="session")
def cluster() -> Iterator[RaySession]:
    """A local Ray with two CPUs, for the whole test session."""
    with ray_session(ClusterSpec(address=None, n_workers=2, cpus_per_worker=1)) as session:
        yield session
