"""One calibration of the demo CNN for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.session import RaySession
from tests.command_line import succeed

CNN = ("model=digits_cnn", "data=digits", "tracking=none")


@pytest.fixture(scope="session")
def cnn_runs(cluster: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output root of a calibrated and quantized ``digits_cnn``. Read it, or copy it."""
    root = tmp_path_factory.mktemp("cnn-runs")
    succeed("calibrate", *CNN, f"output.root={root}")
    succeed("quantize", "model=digits_cnn", "tracking=none", f"output.root={root}")
    return root
