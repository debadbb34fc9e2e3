"""What histograms per channel will take, told before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from qdist.calibration.feeds import load_phases
from qdist.calibration.job import CalibrationJob
from qdist.data.source import DataSource
from qdist.model.shapes import concrete_shapes
from qdist.stats.groups import GroupEstimate, estimate_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSizes:
    """``estimate``: of the ``n_tensors`` that requests match. ``unknown``: those among them whose
    shape nothing tells before the model runs, which the estimate leaves out. ``without_axis``:
    those that lack a request's axis, and so get no histograms from it."""

    estimate: GroupEstimate
    n_tensors: int
    unknown: tuple[str, ...]
    without_axis: tuple[str, ...]


def group_sizes(job: CalibrationJob, source: DataSource) -> GroupSizes:
    """The sizes for the shapes of the first micro-batch, whose samples are loaded.

    Raises `DataError` where they cannot be.
    """
    graph, spec = job.measuring.graph, job.settings.statistics
    tensors = job.taps.tensors
    wanted = {row for row, _ in spec.requests_for(tensors)}
    phase = load_phases(job.grid[0], source, job.inputs, job.decoder)[0]
    inputs = {name: array.shape for name, array in phase.items()}
    found = concrete_shapes(
        graph.model.proto(), inputs, graph.model.data_folder, job.measuring.execution
    ).dims
    shapes = {name: inputs.get(name, found.get(name)) for name in tensors}
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    lacking = dict.fromkeys(
        tensors[row]
        for row, request in spec.requests_for(tensors)
        if tensors[row] in known
        and not -len(known[tensors[row]]) <= request.axis < len(known[tensors[row]])
    )
    return GroupSizes(
        estimate=estimate_bytes(spec, known),
        n_tensors=len(wanted),
        unknown=tuple(tensors[row] for row in sorted(wanted) if tensors[row] not in known),
        without_axis=tuple(lacking),
    )
