"""Real models, from the file to an artifact that runs. Skipped where the folder is absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import pytest
from PIL import Image

from qdist.calibration import first_feeds, input_specs
from qdist.data.source import Feeds
from qdist.emit.qdq import emit_qdq
from qdist.evaluate.builtin import Runner, batches
from qdist.model.freeze import TOLERANCE, freeze, frozen_difference
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.session import measuring_session, run
from qdist.model.taps import find_taps
from qdist.plan.planner import Planner
from tests.onnx_models import EXECUTION, HeldSamples, planner_for, projected

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
MODELS = sorted((SHARED / "models").rglob("*.onnx"))

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not MODELS, reason="the folder of real models is absent"),
]

print([p.name for p in MODELS])
