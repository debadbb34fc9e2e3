"""Icraft's ``lstm_strategy``: recurrent layers are raised whatever they look like."""

from __future__ import annotations

from qdist.plan.dialects.knight_rules import RECURRENT
from qdist.plan.layer_index import LayerIndex
from qdist.search.pickers.picking import Picked, PickSettings


def lstm(index: LayerIndex, settings: PickSettings) -> Picked:
    """LSTM, GRU, RNN and their like. Those without an integer form can be raised to a type of
    floating-point numbers, and stay float32 where ``high`` is an integer."""
    found = [layer for layer in index.layers if layer.op_type in RECURRENT]
    raised = [layer.name for layer in found if index.can_have(layer, settings.high)]
    n_float = len(found) - len(raised)
    notes = (f"{n_float} recurrent layers stay float anyway",) if n_float else ()
    return Picked(
        raised=frozenset(raised),
        why={name: f"a {index.by_name[name].op_type}" for name in raised},
        notes=notes,
    )
