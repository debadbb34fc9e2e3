"""Where channels can be scaled without a change of the outputs: SmoothQuant's places in a graph.

A tensor X can be divided by a factor per channel where all that read it are matrix products with
constant weights, whose rows take the factors, and where constants that make X can be divided by
them: scale and bias of a normalization (one operator, or written out), or the weight and bias of
the linear layer before. Between those constants and X may lie operators that commute with positive
factors: views that keep the channels apart, ReLU, products with another activation.

Where channels lie is counted from the end (1: the last axis), since ranks are not always known.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from qdist.model.graph import Graph, attribute

_DEFAULT = ("", "ai.onnx")
_MICROSOFT = "com.microsoft"
_ASK_SIZES = ("Shape", "Size")
_AROUND_LAST = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
"""Views; they keep the channels where the last axis has the same length before and after."""
_HOMOGENEOUS = ("Relu", "LeakyRelu")
"""Operators of one input with f(c x) = c f(x) for c > 0, to the last bit for powers of two."""

_NORMALIZATIONS: dict[tuple[str, str], tuple[int, int | None]] = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1, None),
    # ONNX Runtime has this one in the default domain.
    ("", "SimplifiedLayerNormalization"): (1, None),
    (_MICROSOFT, "SimplifiedLayerNormalization"): (1, None),
    ("", "BatchNormalization"): (1, 2),
    (_MICROSOFT, "SkipLayerNormalization"): (2, 3),
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): (2, None),
}
"""Normalizations -> the inputs that are scale and bias, of which their first output alone is made.
Their channels are the last axis, but for the second of a BatchNormalization."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A constant that takes factors: input ``index`` of the node ``node``, along ``axis`` (not
    negative). ``sign``: 1 where it is multiplied by the factors, -1 where it is divided."""

    node: str
    index: int
    axis: int
    sign: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothPoint:
    """A tensor whose channels can be scaled. ``n_channels`` of them lie along ``axis`` (not
    negative; None where the rank is not known).

    ``weights``: what reads it; ``makers``: what makes it. ``changed``: the tensors that are divided
    by the factors, in no order: itself, those between the makers and it, and views of it.
    """

    tensor: str
    n_channels: int
    axis: int | None
    weights: tuple[Fold, ...]
    makers: tuple[Fold, ...]
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothPoints:
    """``points`` in graph order. ``left``: other tensors that matrix products with constant weights
    read -> why their channels cannot be scaled."""

    points: tuple[SmoothPoint, ...]
    left: dict[str, str]


def find_points(graph: Graph) -> SmoothPoints:
    """All tensors that can be smoothed, and why others cannot."""
    finder = _Finder(graph)
    points: list[SmoothPoint] = []
    left: dict[str, str] = {}
    for tensor, place in finder.read_by_linear().items():
        try:
            points.append(finder.point(tensor, place))
        except _RefusalError as refusal:
            left[tensor] = str(refusal)
    return SmoothPoints(points=tuple(points), left=left)


class _RefusalError(Exception):
    """Why a tensor is left as it is."""


class _Finder:
    """Looks for the points of one graph. A ``place`` is that of the channels, from the end."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._outputs = set(graph.output_names)

    def read_by_linear(self) -> dict[str, int]:
        """What linear layers read, traced back through views, and the place of its channels."""
        found: dict[str, int] = {}
        for node in self._graph.proto.graph.node:
            if self._weight(node) is None:
                continue
            tensor, place = node.input[0], 1
            while (maker := self._graph.maker.get(tensor)) is not None:
                before = self._place_before(maker, place)
                if before is None:
                    break
                tensor, place = maker.input[0], before
            if self._graph.is_activation(tensor):
                found.setdefault(tensor, place)
        return found

    def point(self, tensor: str, place: int) -> SmoothPoint:
        """Raises `_RefusalError`."""
        weights, changed = self._readers(tensor, place)
        sizes = {self._size(fold) for fold in weights}
        n = sizes.pop()
        if sizes or n < 2:
            raise _RefusalError("it has a single channel" if n < 2 else "its readers disagree")
        makers, between = self._makers(tensor, n, place)
        rank = self._rank(tensor)
        return SmoothPoint(
            tensor=tensor,
            n_channels=n,
            axis=None if rank is None else rank - place,
            weights=tuple(weights),
            makers=tuple(makers),
            changed=tuple(dict.fromkeys((*changed, *between))),
        )

    def _readers(self, tensor: str, place: int) -> tuple[list[Fold], list[str]]:
        """The weights that read the tensor, or a view of it, and all of these names."""
        folds: list[Fold] = []
        names, front = [tensor], [(tensor, place)]
        while front:
            name, at = front.pop()
            self._check(name)
            for node in self._graph.readers[name]:
                fold = self._weight(node)
                after = self._place_after(node, at) if node.input[:1] == [name] else None
                if fold is not None and at == 1 and list(node.input).count(name) == 1:
                    folds.append(fold)
                elif after is not None:
                    names.append(node.output[0])
                    front.append((node.output[0], after))
                elif node.op_type not in _ASK_SIZES:
                    raise _RefusalError(f"{node.op_type} reads it too")
        return folds, names

    def _check(self, name: str) -> None:
        """Raises `_RefusalError` for what others than the graph's nodes see, or no float32."""
        if name in self._outputs:
            raise _RefusalError("it is an output of the model")
        if name not in self._graph.maker:
            is_input = name in self._graph.input_names
            raise _RefusalError("it is an input of the model" if is_input else "it is a constant")
        found = self._graph.type_of(name)
        if found is None or found.element != TensorProto.FLOAT:
            raise _RefusalError("it is not float32")

    def _weight(self, node: NodeProto) -> Fold | None:
        """The constant weight of a linear layer, with the axis that is summed over."""
        if node.domain not in _DEFAULT or node.op_type not in ("MatMul", "Gemm"):
            return None
        if not self._is_constant(node.input[1]):
            return None
        rank = len(self._graph.weights.shape(node.input[1]))
        if node.op_type == "MatMul":
            return Fold(node=node.name, index=1, axis=rank - 2, sign=1) if rank >= 2 else None
        if attribute(node, "transA", 0) or rank != 2:
            return None
        axis = 1 if attribute(node, "transB", 0) else 0
        return Fold(node=node.name, index=1, axis=axis, sign=1)

    def _makers(self, tensor: str, n: int, place: int) -> tuple[list[Fold], list[str]]:
        """The constants that make a tensor, and the tensors between them and it."""
        node = self._graph.maker[tensor]
        before = self._place_before(node, place)
        if before is not None:
            return self._before(node, node.input[0], n, before)
        if node.domain in _DEFAULT:
            match node.op_type:
                case "Mul" | "Div" | "Add" | "Sub":
                    return self._pointwise(node, n, place)
                case "MatMul" | "Gemm":
                    return self._linear(node, n, place), []
                case op_type if op_type in _HOMOGENEOUS:
                    return self._before(node, node.input[0], n, place)
        return self._normalization(node, tensor, n, place), []

    def _before(
        self, node: NodeProto, name: str, n: int, place: int
    ) -> tuple[list[Fold], list[str]]:
        """The makers of an input of a node that is to be scaled with its output."""
        self._check(name)
        others = [r for r in self._graph.readers[name] if r.op_type not in _ASK_SIZES]
        if len(others) > 1 or list(node.input).count(name) > 1:
            raise _RefusalError(f"what {node.op_type} makes it of is read elsewhere too")
        folds, between = self._makers(name, n, place)
        return folds, [name, *between]

    def _pointwise(self, node: NodeProto, n: int, place: int) -> tuple[list[Fold], list[str]]:
        constant = [index for index, name in enumerate(node.input) if self._is_constant(name)]
        if len(constant) != 1:
            return self._product(node, n, place)
        (index,) = constant
        other = node.input[1 - index]
        is_vector = self._has_channels(node.input[index], n, place)
        if node.op_type in ("Mul", "Div") and is_vector:
            # The constant takes all of it: 1 / c is divided where c is multiplied.
            sign = 1 if node.op_type == "Div" and index == 1 else -1
            return [self._fold(node, index, sign, place)], []
        if node.op_type == "Div" and index == 0:
            raise _RefusalError("it is a quotient")
        folds, between = self._before(node, other, n, place)
        if node.op_type in ("Add", "Sub"):
            if not is_vector:
                raise _RefusalError(f"{node.op_type} has one constant for all channels")
            folds = [self._fold(node, index, -1, place), *folds]
        return folds, between

    def _product(self, node: NodeProto, n: int, place: int) -> tuple[list[Fold], list[str]]:
        """Of two activations, either may be scaled: the gate of an MLP is read by others."""
        if node.op_type != "Mul":
            raise _RefusalError(f"{node.op_type} of activations makes it")
        for name in node.input:
            try:
                return self._before(node, name, n, place)
            except _RefusalError:
                continue
        raise _RefusalError("Mul makes it of activations that cannot be scaled")

    def _linear(self, node: NodeProto, n: int, place: int) -> list[Fold]:
        weight = node.input[1]
        if not self._is_constant(weight) or not self._graph.is_activation(node.input[0]):
            raise _RefusalError(f"{node.op_type} of activations makes it")
        shape = self._graph.weights.shape(weight)
        turned = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        axis = len(shape) - (2 if turned else 1)
        if len(shape) < 2 or shape[axis] != n or place != 1:
            raise _RefusalError(f"{node.op_type} makes it with a weight of another shape")
        folds = [Fold(node=node.name, index=1, axis=axis, sign=-1)]
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
            if not self._is_constant(node.input[2]):
                raise _RefusalError("its bias is no constant")
            if not self._has_channels(node.input[2], n, 1):
                raise _RefusalError("Gemm has one bias for all channels")
            folds.append(self._fold(node, 2, -1, 1))
        return folds

    def _normalization(self, node: NodeProto, tensor: str, n: int, place: int) -> list[Fold]:
        domain = "" if node.domain in _DEFAULT else node.domain
        known = _NORMALIZATIONS.get((domain, node.op_type))
        if known is None or tensor != node.output[0]:
            raise _RefusalError(f"{node.op_type} makes it")
        rank = self._rank(tensor)
        axis = -1
        if node.op_type == "BatchNormalization":
            axis = 1
        elif place != 1 or attribute(node, "axis", -1) not in (-1, None if not rank else rank - 1):
            raise _RefusalError(f"{node.op_type} is not over its channels alone")
        if axis == 1 and (rank is None or rank - place != 1 or len(node.output) > 1):
            raise _RefusalError(f"{node.op_type} has other channels")
        folds = []
        for index in known:
            if index is None or index >= len(node.input) or not node.input[index]:
                continue
            name = node.input[index]
            if not self._is_constant(name) or not self._has_channels(name, n, 1):
                raise _RefusalError(f"{node.op_type} has a scale that is no constant per channel")
            folds.append(self._fold(node, index, -1, 1))
        return folds

    def _fold(self, node: NodeProto, index: int, sign: int, place: int) -> Fold:
        rank = len(self._graph.weights.shape(node.input[index]))
        return Fold(node=node.name, index=index, axis=rank - place, sign=sign)

    def _size(self, fold: Fold) -> int:
        name = self._graph.nodes[fold.node].input[fold.index]
        return self._graph.weights.shape(name)[fold.axis]

    def _is_constant(self, name: str) -> bool:
        """A float32 constant; those of other types are left alone."""
        found = self._graph.constants.get(name)
        return found is not None and found.data_type == TensorProto.FLOAT

    def _has_channels(self, constant: str, n: int, place: int) -> bool:
        """Whether a constant has a value, or more, for each channel."""
        shape = self._graph.weights.shape(constant)
        return len(shape) >= place and shape[-place] == n

    def _last(self, tensor: str) -> int | str | None:
        found = self._graph.type_of(tensor)
        return found.shape[-1] if found is not None and found.shape else None

    def _rank(self, tensor: str) -> int | None:
        """Of a tensor's shape, or of the permutation that reads or makes it."""
        found = self._graph.type_of(tensor)
        if found is not None and found.shape is not None:
            return len(found.shape)
        maker = self._graph.maker.get(tensor)
        around = [*self._graph.readers.get(tensor, ()), *([maker] if maker is not None else [])]
        orders = (attribute(node, "perm") for node in around if node.op_type == "Transpose")
        return next((len(order) for order in orders if order is not None), None)

    def _place_before(self, node: NodeProto, place: int) -> int | None:
        """Where the channels of a view's output lie in its first input; None for no view of it."""
        if node.op_type == "Transpose" and node.domain in _DEFAULT:
            order = attribute(node, "perm")
            return None if order is None else len(order) - order[len(order) - place]
        return 1 if place == 1 and self._keeps_last(node) else None

    def _place_after(self, node: NodeProto, place: int) -> int | None:
        """The other way round."""
        if node.op_type == "Transpose" and node.domain in _DEFAULT:
            order = attribute(node, "perm")
            return None if order is None else len(order) - list(order).index(len(order) - place)
        return 1 if place == 1 and self._keeps_last(node) else None

    def _keeps_last(self, node: NodeProto) -> bool:
        """Whether the first output has the channels of the first input, along the last axis."""
        if node.domain not in _DEFAULT or not node.input:
            return False
        if node.op_type in _AROUND_LAST:
            last = self._last(node.input[0])
            return isinstance(last, int) and last == self._last(node.output[0])
        rank = self._rank(node.input[0])
        # A choice of rows, such as the class token.
        is_choice = node.op_type == "Gather" and self._graph.is_activation(node.input[0])
        return is_choice and rank is not None and attribute(node, "axis", 0) not in (-1, rank - 1)
