"""How long the tables of functions are."""

from __future__ import annotations

TABLE_BITS = (8, 9, 10, 11, 12)
"""A table has ``2**bits`` intervals (Knight's ``lut-len``, for 16-bit numbers alone)."""
FUNCTIONS = frozenset(
    {
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Mish",
        "Reciprocal",
        "Sigmoid",
        "Softplus",
        "Sqrt",
        "Tanh",
    }
)
"""Operators whose result at each place depends on the input there alone, and on nothing else."""
ROW_FUNCTIONS = frozenset({"Softmax", "LayerNormalization"})
"""Operators on whole rows with one function of a single number inside."""
TABLE_OPERATORS = FUNCTIONS | ROW_FUNCTIONS
