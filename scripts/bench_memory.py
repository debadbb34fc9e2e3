"""Peaks of memory, each measured in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_models import Case
from bench_timing import Role


def memory(
    case: Case, n_few: int, n_many: int, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Growth with the number of samples, and the peak above the loaded model beside ORT's.

    *Above the loaded model*: VmHWM of the process less its VmRSS when the sessions are loaded and
    the plain model has run once. What else the machine does meanwhile changes no peak.
    """
    given = case.to_json()

    def peak(role: str, n: int) -> dict[str, int]:
        place = {"store": str(folder / f"memory-{n}.zarr"), "folder": str(folder)}
        with Role(role, {"case": given, "n_samples": n, **place}) as process:
            found: dict[str, int] = process.answer()
        return found

    at_few, at_many = (peak("memory of ours", n) for n in (n_few, n_many))
    of_ort = peak("memory of ort", n_few)
    above = {
        "ours": at_few["peak_bytes"] - at_few["loaded_bytes"],
        "ONNX Runtime": of_ort["peak_bytes"] - of_ort["loaded_bytes"],
    }
    say(
        f"above the loaded model: ours {above['ours'] / 1e6:.0f} MB, ONNX Runtime "
        f"{above['ONNX Runtime'] / 1e6:.0f} MB; peak at {n_few} samples "
        f"{at_few['peak_bytes'] / 1e6:.0f} MB, at {n_many} {at_many['peak_bytes'] / 1e6:.0f} MB"
    )
    return {
        "rss_vs_ort_percentile": above["ours"] / above["ONNX Runtime"],
        "rss_growth": at_many["peak_bytes"] / at_few["peak_bytes"],
        "rss_bytes": {
            "above_loaded": above,
            "peak_at": {str(n_few): at_few["peak_bytes"], str(n_many): at_many["peak_bytes"]},
        },
    }
