"""From a graph and its taps to what a worker needs to measure them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qdist.calibration.settings import CalibrationSettings
from qdist.data.decoder import Decoder
from qdist.data.positions import MaskDims, feature_widths
from qdist.errors import DataError, ModelError
from qdist.model.channels import channel_axes
from qdist.model.estimate import BASE_BYTES
from qdist.model.graph import Graph
from qdist.model.segments import Segment, cut, whole
from qdist.model.session import Execution
from qdist.model.shapes import concrete_shapes
from qdist.model.taps import TapTable
from qdist.stats.groups import estimate_bytes
from qdist.stats.observer import SPOOL_BYTES, ObserverSpec, Padding

LEAST_SPOOL_BYTES = 1 << 20
"""What waits between segments in memory where a budget has no room for more."""
Shapes = Mapping[str, tuple[int, ...]]
"""Input of the model -> shape, batch axis included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """What observers of one job have in common, whatever they tap.

    ``shapes``: the inputs of the largest micro-batch, one mapping for each phase. ``axes``: of
    channels, where they are to be others than `channel_axes` says. ``masked``: of `sentinel_paths`.
    """

    graph: Graph
    settings: CalibrationSettings
    execution: Execution
    shapes: tuple[Shapes, ...]
    decoder: Decoder | None = None
    axes: Mapping[str, int] = field(default_factory=dict)
    masked: Mapping[str, str] = field(default_factory=dict)

    def observer(self, taps: TapTable) -> ObserverSpec:
        """What measures ``taps``. Raises QD211 where the memory budget is too small."""
        carry = () if self.decoder is None else self.decoder.carry
        hands = [output for _, output in carry]
        budget = self.settings.memory_budget_bytes
        spool = SPOOL_BYTES
        if budget is None:
            segments: tuple[Segment, ...] = (whole(self.graph, taps, hands=hands),)
        else:
            spool = min(SPOOL_BYTES, budget // 16)
            base = BASE_BYTES + self._group_bytes(taps)
            try:
                segments = self._cut(taps, hands, budget, base + spool)
            except ModelError as error:
                if error.code != "QD211":
                    raise
                # What waits between segments can go to files at once: the need that is named
                # is then one that is enough.
                spool = LEAST_SPOOL_BYTES
                segments = self._cut(taps, hands, budget, base + spool)
        return ObserverSpec(
            segments=segments,
            data_folder=self.graph.model.data_folder,
            taps=taps,
            execution=self.execution,
            on_nan=self.settings.on_nan,
            statistics=self.settings.statistics,
            channel_axes={
                **channel_axes(self.graph, taps),
                **{name: axis for name, axis in self.axes.items() if name in taps.tensors},
            },
            carry=carry,
            padding=self._padding(taps),
            spool_bytes=spool,
        )

    def _cut(self, taps: TapTable, hands: list[str], budget: int, base: int) -> tuple[Segment, ...]:
        return cut(
            self.graph,
            taps,
            _as_shapes(self.shapes),
            budget,
            hands=hands,
            base_bytes=base,
            execution=self.execution,
        )

    def _group_bytes(self, taps: TapTable) -> int:
        """What histograms per channel hold, which is more than the estimate has for a tap."""
        if not self.settings.statistics.groups:
            return 0
        model = self.graph.model
        dims = concrete_shapes(
            model.proto(), self.shapes[0], model.data_folder, self.execution
        ).dims
        known = {name: dims[name] for name in taps.tensors if name in dims}
        return estimate_bytes(self.settings.statistics, known).memory_bytes

    def _padding(self, taps: TapTable) -> Padding | None:
        """How padded positions are found in the taps. Raises QD307 for an unknown mask input."""
        mask = self.settings.mask_input
        if mask is None:
            return None
        if mask not in self.graph.input_names:
            raise DataError(
                "QD307",
                where="data.calibration.mask_input",
                got=mask,
                expected=f"an input of the model: {', '.join(self.graph.input_names)}",
                mend="correct the name, or leave mask_input out",
            )
        types = {name: self.graph.type_of(name) for name in (mask, *taps.tensors)}
        dims = {name: found.shape for name, found in types.items() if found and found.shape}
        batch, sequence = (*dims.get(mask, ()), None, None)[:2]
        return Padding(
            mask=mask,
            names=MaskDims(
                batch=batch, sequence=sequence, widths=feature_widths(self.graph.proto.graph)
            ),
            dims=dims,
            axes=self.settings.sequence_axes,
        )


def _as_shapes(shapes: Sequence[Shapes]) -> list[dict[str, tuple[int, ...]]]:
    return [dict(phase) for phase in shapes]
