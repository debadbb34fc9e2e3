"""One Ray and one calibration of the demo CNN for all tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.session import ClusterSpec, RaySession, ray_session
from tests.command_line import succeed

CNN = ("model=digits_cnn", "data=digits", "tracking=none")


@pytest.fixture(scope="session")
def cluster() -> Iterator[RaySession]:
    """A local Ray with two CPUs, which every command of this process then uses."""
    with ray_session(ClusterSpec(address=None, n_workers=2, cpus_per_worker=1)) as session:
        yield session


@pytest.fixture(scope="session")
def cnn_runs(cluster: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output root of a calibrated and quantized ``digits_cnn``. Read it, or copy it."""
    root = tmp_path_factory.mktemp("cnn-runs")
    succeed("calibrate", *CNN, f"output.root={root}")
    succeed("quantize", "model=digits_cnn", "tracking=none", f"output.root={root}")
    return root
