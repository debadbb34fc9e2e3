"""Sessions that hold as little memory as they can.

The CPU arena of ONNX Runtime grows in powers of two and gives nothing back before its session
ends, which is fast for one session that stays, and too much where a budget counts. Without it
each tensor is allocated as it is made and freed after its last reader.

Measured (ONNX Runtime 1.31, CPU, a transformer of 547 MB of external weights): a session with
prepacking holds each packed weight once, in private memory, and the file's pages only while that
weight is packed. Without prepacking the weights are file pages and the matrix products have other
last bits, so prepacking has to be as it is for the whole model.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from qdist.model.session import Execution, measuring_options, open_session


def frugal_session(
    model: bytes, data_folder: Path | None, execution: Execution
) -> ort.InferenceSession:
    """A measuring session without an arena: same bits, least memory. Raises QD205."""
    options = measuring_options(execution)
    options.enable_cpu_mem_arena = False
    return open_session(model, data_folder, execution, options)
