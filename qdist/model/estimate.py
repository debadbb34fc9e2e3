"""How much memory consecutive steps of a graph take, before anything runs.

The sum of: weights, each once as its kernel packs it (once per packing reader); the file pages or
graph bytes of the weight being packed; tensors that come from earlier segments and the inputs, held
while the segment runs; outputs, held until it ends; what lives between; a kernel's workspace; and
what the statistics of a measured tensor take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto, TensorProto, helper

from qdist.model.flow import Flow, Step
from qdist.model.shapes import Shapes
from qdist.model.weights import n_bytes_of

BASE_BYTES = 352 << 20
"""What a worker holds without any model, file pages included: the interpreter, Ray, NumPy, Numba's
kernels, ONNX Runtime and Zarr.

Measured (resident, Linux x86-64), in a Ray actor: 79 MiB before anything is imported, 223 MiB with
the imports and its `CalibrationWorker`, 283 MiB with the kernels loaded, 291 MiB with a session of
a tiny model, 295 MiB after its shards; where the worker had to compile the kernels, 338, 345 and
349 MiB. Some 160 MiB are file pages, which the workers of one machine share. Without Ray: 122 MiB
with the imports, 136 to 153 MiB after a model was frozen, indexed and cut."""
TAP_BYTES = 160 << 10
"""What the statistics of one measured tensor take while they are gathered. Measured: 136 KiB."""
RECORD_BYTES = 144 << 10
"""What its finished record takes until the last segment is through, and joined then. Measured: 67
KiB, twice."""
SLACK = 1.05
"""What allocators lose: page ends and the holes between blocks."""
_INLINE_COPIES = 3
"""Weights inside the graph: its bytes, the parsed graph and the tensor exist at once."""
_PACKING = frozenset(
    {
        "MatMul",
        "Gemm",
        "QLinearMatMul",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "LSTM",
        "GRU",
        "Attention",
        "QAttention",
        "FusedMatMul",
        "FusedGemm",
    }
)
"""Operators whose kernels keep a packed copy of a constant weight in place of the original."""
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What steps ``start..stop`` take, in bytes. ``peak_bytes`` holds everything, slack included.

    ``breaker``: the largest single thing in it, named for people.
    """

    start: int
    stop: int
    weight_bytes: int
    peak_bytes: int
    breaker: str


class Estimate:
    """Sizes of all tensors of a flow, at their largest over the given shapes."""

    def __init__(
        self, flow: Flow, shapes: Sequence[Shapes], measured: frozenset[str] = frozenset()
    ) -> None:
        """``measured``: outputs whose statistics are gathered (names of the flow's outputs)."""
        self.flow = flow
        self._shapes = shapes
        self._measured = measured
        names = {*flow.maker, *flow.inputs, *flow.constant_nodes}
        self.n_bytes: Mapping[str, int] = {
            name: max((entry.n_bytes(name) or 0) for entry in shapes) for name in names
        }
        self.elements: Mapping[str, int] = shapes[0].elements
        self.last_use: Mapping[str, int] = {
            name: position for position, step in enumerate(flow.steps) for name in step.constants
        }
        """The last step that reads what is made of constants."""
        self._work = [self._workspace(step) for step in flow.steps]
        inline = (t for t in flow.weights.values() if t.data_location != TensorProto.EXTERNAL)
        self.inline_bytes = sum(n_bytes_of(tensor) for tensor in inline)
        """Weights inside the graph, which are part of the segments' bytes."""
        self.held_bytes = self.inline_bytes + len(measured) * RECORD_BYTES
        """What is held whichever part runs."""

    def grow(self, start: int) -> Iterator[Need]:
        """The needs of ``start..stop`` for ``stop = start + 1, start + 2, ...``: never less."""
        window = _Window(self, start)
        for position in range(start, len(self.flow.steps)):
            yield window.add(position)

    def need(self, start: int, stop: int) -> Need:
        """The need of one range of steps; of none where it is empty."""
        found = Need(start=start, stop=start, weight_bytes=0, peak_bytes=0, breaker="nothing")
        window = _Window(self, start)
        for position in range(start, stop):
            found = window.add(position)
        return found

    def work_bytes(self, position: int) -> int:
        """What the kernel of a step takes besides its inputs and outputs."""
        return self._work[position]

    def is_measured(self, tensor: str) -> bool:
        """Whether statistics of this output are gathered."""
        return tensor in self._measured

    def _workspace(self, step: Step) -> int:
        node = step.node
        read = [self._size(name) for name in node.input if name]
        made = sum(self.n_bytes.get(name, 0) for name in step.makes)
        if node.op_type == "ConvTranspose":
            return self._columns(node)
        if node.op_type == "Conv":
            # The columns of all positions, or of the filters where these are fewer.
            return min(self._columns(node), self._size(node.input[1]))
        if node.op_type == "Einsum":
            return sum(read) + made
        if node.op_type in _ATTENTION:
            return sum(read) + made + self._scores(node)
        if node.op_type in ("Softmax", "LogSoftmax", "TopK", "Where", "Expand"):
            return made
        return 0

    def _columns(self, node: NodeProto) -> int:
        """Bytes of the unfolded image of a convolution: one filter at every position."""
        weight = self.flow.weights.get(node.input[1])
        if weight is None or len(weight.dims) < 3:
            return 0
        area = 1
        for n in weight.dims[2:]:
            area *= n
        return area * max(self._size(node.input[0]), self._size(node.output[0]))

    def _scores(self, node: NodeProto) -> int:
        """Bytes of the scores inside a fused attention: heads times length squared, in float32."""
        heads = next((a.i for a in node.attribute if a.name == "num_heads"), 1)
        worst = 0
        for shapes in self._shapes:
            dims = shapes.dims.get(node.input[0], ())
            if len(dims) == 3:
                past = max(
                    (shapes.dims[n][-2] for n in node.input if len(shapes.dims.get(n, ())) == 4),
                    default=0,
                )
                worst = max(worst, 4 * dims[0] * heads * dims[1] * (dims[1] + past))
        return 2 * worst

    def _size(self, name: str) -> int:
        if name in self.flow.weights:
            return n_bytes_of(self.flow.weights[name])
        return self.n_bytes.get(name, 0)


class _Window:
    """A range of steps that grows at its end, and what it needs."""

    def __init__(self, estimate: Estimate, start: int) -> None:
        self._estimate = estimate
        self._flow = estimate.flow
        self._start = start
        self._seen: set[str] = set()
        self._plain: set[str] = set()
        self._weights = self._loading = self._inline = 0
        self._held = self._live = self._most_live = 0
        self._reading = self._statistics = 0
        self._largest = (0, "nothing")

    def add(self, position: int) -> Need:
        step = self._flow.steps[position]
        size = self._estimate.n_bytes
        self._add_weights(step)
        for name in step.constants:
            if name not in self._seen:
                self._seen.add(name)
                self._live += size[name]
                self._note(size[name], f"tensor {name}")
        for name in (*step.inputs, *step.reads):
            if name in self._seen or self._flow.maker.get(name, -1) >= self._start:
                continue
            self._seen.add(name)
            self._held += size[name]
            self._note(size[name], f"tensor {name}")
        for name in step.makes:
            self._live += size[name]
            self._note(size[name], f"tensor {name}")
            if self._estimate.is_measured(name):
                self._statistics += TAP_BYTES
                self._reading = max(self._reading, self._as_float32(name))
        work = self._estimate.work_bytes(position)
        self._note(work, f"the workspace of {step.node.op_type} {step.node.name}")
        self._most_live = max(self._most_live, self._live + work)
        for name in (*step.reads, *step.makes):
            if (
                self._flow.maker[name] >= self._start
                and self._flow.last_reader.get(name, -1) <= position
                and name not in self._flow.kept
            ):
                self._live -= size[name]
        for name in step.constants:
            if self._estimate.last_use[name] == position:
                self._live -= size[name]
        fixed = self._weights + self._inline + self._held + self._statistics
        peak = max(
            self._weights + self._inline + self._loading,
            fixed + self._most_live,
            fixed + self._live + self._reading,
        )
        return Need(
            start=self._start,
            stop=position + 1,
            weight_bytes=self._weights,
            peak_bytes=int(peak * SLACK),
            breaker=f"{self._largest[1]} ({self._largest[0]} bytes)",
        )

    def _add_weights(self, step: Step) -> None:
        self._weights += step.n_own_bytes
        for name in step.weights:
            tensor = self._flow.weights[name]
            n_bytes = n_bytes_of(tensor)
            packs = step.node.op_type in _PACKING and name in step.node.input
            if packs or name not in self._plain:
                self._weights += n_bytes
                self._note(n_bytes, f"weight {name}")
            if not packs:
                self._plain.add(name)
            else:
                self._loading = max(self._loading, n_bytes)
            if name not in self._seen and tensor.data_location != TensorProto.EXTERNAL:
                self._inline += (_INLINE_COPIES - 1) * n_bytes
            # A packing reader keeps a copy of its own, and does without the original.
            self._seen.add(name)

    def _as_float32(self, name: str) -> int:
        """Reading an output makes a float32 copy where it is another type or order."""
        element = self._estimate.elements.get(name, TensorProto.FLOAT)
        size = self._estimate.n_bytes[name]
        if element == TensorProto.FLOAT:
            return size
        return size * 4 // max(1, helper.tensor_dtype_to_np_dtype(element).itemsize)

    def _note(self, n_bytes: int, what: str) -> None:
        if n_bytes > self._largest[0]:
            self._largest = (n_bytes, what)
