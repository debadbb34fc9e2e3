"""What a user's inference function is called with, after the contract of Tsingmicro's Knight::

    def infer(executor):
        images = np.load(executor.dataset)
        for i in range(executor.iteration):
            batch = images[i * executor.batch_size : (i + 1) * executor.batch_size]
            logits = executor.forward(batch)[0]

The same function serves calibration (`qdist.data.captured`, which keeps what is fed) and
evaluation (where its return value is the score).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.errors import DataError
from qdist.model.graph import Graph

Run = Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]]
"""Feeds by input name -> outputs in the graph's order."""
Shapes = dict[str, list[int | str | None]]
"""Layer -> shape of its first output; None and names where an axis is not fixed."""


@dataclass(slots=True, kw_only=True)
class Executor:
    """The model as the user's function sees it. Used by one thread.

    run: feeds by input name -> the outputs in the order of ``output_nodes``.
    input_nodes, output_nodes: names in the graph's order.
    model_path: the model that is run.
    iteration: how many batches the user asked for; None for all there are.
    batch_size: how many samples the user wants in one batch.
    dataset: the user's own name or path of the data set; None if not set.
    early_stop_flag: functions leave their loop when it turns true.
    shape_dicts: layer -> shape of its first output, once `init_shape_info` was called.
    node_of_output: output of every operator -> the operator's name.
    node_shapes: layer -> shape of its first output, as far as shape inference tells.
    describe: gives these two when the function first asks for either; None: they are given.
    """

    run: Run
    input_nodes: list[str]
    output_nodes: list[str]
    model_path: Path
    iteration: int | None = None
    batch_size: int = 1
    dataset: str | None = None
    early_stop_flag: bool = False
    shape_dicts: Shapes = field(default_factory=dict)
    node_of_output: dict[str, str] = field(default_factory=dict)
    node_shapes: Shapes = field(default_factory=dict)
    describe: Callable[[], tuple[dict[str, str], Shapes]] | None = None

    def forward(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Run the model once. One array per input, in the order of ``input_nodes``.

        Raises `qdist.errors.DataError` QD307 for another number of arrays, and what ``run``
        raises for arrays that the model does not take.
        """
        if len(inputs) != len(self.input_nodes):
            raise DataError(
                "QD307",
                where="executor.forward",
                got=f"{len(inputs)} arrays",
                expected=f"{len(self.input_nodes)}: {', '.join(self.input_nodes)}",
                mend="give one array per input of the model, in this order",
            )
        arrays = (np.asarray(array) for array in inputs)
        return self.run(dict(zip(self.input_nodes, arrays, strict=True)))

    def init_shape_info(self) -> Shapes:
        """Fill ``shape_dicts``, and return it. Raises what ``describe`` raises."""
        self._describe()
        self.shape_dicts = {name: list(shape) for name, shape in self.node_shapes.items()}
        return self.shape_dicts

    def output_name_to_node_name(self) -> dict[str, str]:
        """Output of every operator -> the operator's name. Raises what ``describe`` raises."""
        self._describe()
        return dict(self.node_of_output)

    def _describe(self) -> None:
        if self.describe is not None:
            self.node_of_output, self.node_shapes = self.describe()
            self.describe = None


def layer_names(graph: Graph) -> tuple[dict[str, str], Shapes]:
    """Output of every operator -> the operator's name; and the shapes of layers."""
    shapes: Shapes = {}
    for name, node in graph.nodes.items():
        found = graph.type_of(node.output[0])
        if found is not None and found.shape is not None:
            shapes[name] = list(found.shape)
    return {name: node.name for name, node in graph.maker.items()}, shapes


def executor_for(
    graph: Graph,
    run: Run,
    *,
    batch_size: int = 1,
    iteration: int | None = None,
    dataset: str | None = None,
) -> Executor:
    """The executor of a frozen model, whose outputs ``run`` computes."""
    layers, shapes = layer_names(graph)
    return Executor(
        run=run,
        input_nodes=list(graph.input_names),
        output_nodes=list(graph.output_names),
        model_path=graph.model.source,
        iteration=iteration,
        batch_size=batch_size,
        dataset=dataset,
        node_of_output=layers,
        node_shapes=shapes,
    )


def place_of(error: BaseException, function: Callable[..., Any]) -> str:
    """File and line of the innermost frame in the user's own file, where ``error`` came from.

    Where that file has no frame: of the innermost one below the call, or of nothing when the call
    itself failed, because the function does not take these arguments.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    own = [frame for frame in frames if frame.filename == file] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else f"the call of {function!r}"
