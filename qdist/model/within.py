"""Running a model once within a memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, inliner

from qdist.errors import ModelError
from qdist.memory import give_back
from qdist.model.cutting import plan_cuts
from qdist.model.estimate import BASE_BYTES
from qdist.model.frugal import frugal_session
from qdist.model.half import widen
from qdist.model.rewrite import drop_initializer_inputs
from qdist.model.segments import segments_of
from qdist.model.session import Execution, run
from qdist.model.spool import Spool


def run_within(
    model: bytes,
    data_folder: Path | None,
    feeds: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
    budget_bytes: int,
    execution: Execution,
    *,
    base_bytes: int = BASE_BYTES,
    spool_bytes: int = 0,
) -> dict[str, NDArray[Any]]:
    """Named outputs of a model, bit-equal to those of a measuring session over the whole, in which
    the rounding of half precision is written out.

    ``model``: a serialized ``ModelProto``, as given or frozen, with external data in
    ``data_folder``. ``outputs``: any tensors of the main graph; they are held in memory. Tensors
    between segments beyond ``spool_bytes`` wait on disk. Raises `ModelError` QD211 where the
    model cannot be cut small enough, QD205 where it does not run, QD208 for an unknown output.
    """
    proto = _with_outputs(ModelProto.FromString(model), outputs)
    widen(proto, data_folder, execution)
    shapes = {name: array.shape for name, array in feeds.items()}
    plan = plan_cuts(
        proto,
        [shapes],
        budget_bytes - spool_bytes,
        folder=data_folder,
        execution=execution,
        base_bytes=base_bytes,
    )
    found = segments_of(plan)
    last = {name: i for i, segment in enumerate(found) for name in segment.receives}
    results = {name: feeds[name] for name in outputs if name in feeds}
    with Spool(spool_bytes) as spool:
        for index, segment in enumerate(found):
            given = {name: feeds[name] for name in segment.feeds}
            given.update((name, spool.get(name)) for name in segment.receives)
            for name in segment.receives:
                if last[name] == index:
                    spool.drop(name)
            wanted = list(dict.fromkeys((*segment.hands, *segment.sends)))
            session = frugal_session(segment.graph_bytes, data_folder, execution)
            made = dict(zip(wanted, run(session, wanted, given), strict=True))
            del session, given
            for name in segment.sends:
                spool.put(name, made[name])
            results.update((name, made[name]) for name in segment.hands)
            del made
            give_back()
    return {name: results[name] for name in outputs}


def _with_outputs(proto: ModelProto, outputs: Sequence[str]) -> ModelProto:
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    drop_initializer_inputs(proto)
    made = {name for node in proto.graph.node for name in node.output}
    declared = {value.name: value for value in (*proto.graph.value_info, *proto.graph.output)}
    inputs = {value.name for value in proto.graph.input}
    kept = []
    for name in dict.fromkeys(outputs):
        if name not in made | inputs:
            raise ModelError(
                "QD208",
                where=f"output {name}",
                got="a name that the graph does not make",
                expected="a tensor of the main graph",
                mend="name one of its outputs",
            )
        if name in made:
            kept.append(declared.get(name, ValueInfoProto(name=name)))
    copies = [ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del proto.graph.output[:]
    proto.graph.output.extend(copies)
    del proto.graph.value_info[:]
    return proto
