"""What rules say about a tensor, or about what its values were moved from."""

from __future__ import annotations

from collections.abc import Mapping

from qdist.model.taps import TapTable
from qdist.plan.layer_index import LayerIndex
from qdist.plan.tensor_settings import TensorSettings


class TensorRules:
    """The settings of tensors of one model. Read-only once built."""

    def __init__(
        self, settings: Mapping[str, TensorSettings], index: LayerIndex, taps: TapTable
    ) -> None:
        self._index = index
        self._taps = taps
        # By the tensor that was measured: a view shares the range of its source.
        self._by_row: dict[str, TensorSettings] = {}
        for name, entry in settings.items():
            row = taps.row_of(name)
            self._by_row[row] = entry.over(self._by_row.get(row, TensorSettings()))

    def of(self, tensor: str) -> TensorSettings | None:
        """What rules say about an activation or a weight; None where they say nothing."""
        if not self._by_row:
            return None
        for name in (tensor, *self._index.moved_from(tensor)):
            found = self._by_row.get(self._taps.row_of(name))
            if found is not None:
                return found
        return None
