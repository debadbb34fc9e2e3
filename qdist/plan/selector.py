"""Which layers, or which tensors, a rule is about.

A selector is words joined by `` & ``; each narrows down what those before it left, so that
``op:Conv & first:2`` are the first two convolutions.

| word | what it takes |
| --- | --- |
| ``NAME``, ``PATTERN`` | layers by name, or a pattern with ``*``, ``?`` and ``[...]`` |
| ``layer:NAME`` | the layer of exactly that name |
| ``re:REGEX`` | layers whose whole name matches the regular expression |
| ``op:TYPE`` | layers of an operator type; a pattern too |
| ``block:N``, ``block:N-M`` | the residual blocks of these numbers, from 0 |
| ``block:SCOPE`` | layers below a scope of their names: ``blocks.0``, ``layer1/layer1.*`` |
| ``first:N``, ``last:N`` | the first or last N that can have a choice |
| ``before:NAME``, ``after:NAME`` | the layer and all it depends on, or all that depend on it |
| ``until_compute:NAME`` | the layer and those after it, up to the next matmul- or conv-like one |

A selector that begins with ``tensor:`` takes tensors by name or pattern, one that begins with
``output:`` the outputs of the layers that the rest takes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from qdist.errors import PlanError
from qdist.model.layers import Layer
from qdist.plan.layer_index import LayerIndex

LAYER = "layer:"
TENSOR = "tensor:"
OUTPUT = "output:"
_AND = " & "
_MAGIC = re.compile(r"[*?\[]")
Names = tuple[str, ...]


def is_of_tensors(match: str) -> bool:
    """Whether the selector takes tensors rather than layers."""
    return match.startswith((TENSOR, OUTPUT))


def select_layers(match: str, index: LayerIndex) -> tuple[Layer, ...]:
    """The layers that ``match`` takes, in order; none where nothing matches.

    Raises QD503 for a word that cannot be: a number or expression that is none, a block or layer
    that is not there.
    """
    if match.startswith(LAYER) and match[len(LAYER) :] in index.by_name:
        # Names of layers may hold anything, also what joins words.
        return (index.by_name[match[len(LAYER) :]],)
    left = index.layers
    for word in match.split(_AND):
        kind, colon, rest = word.strip().partition(":")
        step = _WORDS.get(kind) if colon else None
        left = _by_name(word.strip(), left) if step is None else step(rest, left, index, match)
    return left


def select_tensors(match: str, index: LayerIndex) -> Names:
    """The tensors that ``match`` takes. Raises QD503 as `select_layers` does."""
    if match.startswith(TENSOR):
        wanted = match.removeprefix(TENSOR)
        if not _MAGIC.search(wanted):
            return (wanted,) if wanted in index.tensor_names else ()
        return tuple(n for n in index.tensors if n == wanted or fnmatchcase(n, wanted))
    layers = select_layers(match.removeprefix(OUTPUT), index)
    outputs = (name for layer in layers for name in index.adjacency.outputs(layer.name))
    return tuple(dict.fromkeys(outputs))


def nearby(match: str, index: LayerIndex) -> str:
    """What comes close to a selector without a match."""
    if match.startswith(TENSOR):
        return "a tensor such as " + ", ".join(close(match[len(TENSOR) :], index.tensors))
    for word in match.removeprefix(OUTPUT).split(_AND):
        if word.startswith("op:"):
            found = sorted({layer.op_type for layer in index.layers})
            return "an operator type of the model: " + ", ".join(found)
        if word.startswith("block:"):
            return f"one of {len(index.blocks)} residual blocks, or a scope such as " + ", ".join(
                close(word[6:], _scopes(index))
            )
    name = match.removeprefix(OUTPUT).split(_AND)[0].removeprefix("layer:").removeprefix("re:")
    return "a layer such as " + ", ".join(close(name, [layer.name for layer in index.layers]))


def close(name: str, names: Sequence[str]) -> list[str]:
    """Up to three of ``names`` that are like ``name``; the first three if none is."""
    return difflib.get_close_matches(name.strip("*"), names, n=3, cutoff=0.3) or list(names[:3])


def _by_name(wanted: str, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    return tuple(x for x in layers if x.name == wanted or fnmatchcase(x.name, wanted))


def _exactly(
    rest: str, layers: Sequence[Layer], index: LayerIndex, match: str
) -> tuple[Layer, ...]:
    return tuple(layer for layer in layers if layer.name == rest)


def _by_type(
    rest: str, layers: Sequence[Layer], index: LayerIndex, match: str
) -> tuple[Layer, ...]:
    return tuple(layer for layer in layers if fnmatchcase(layer.op_type, rest))


def _by_expression(
    rest: str, layers: Sequence[Layer], index: LayerIndex, match: str
) -> tuple[Layer, ...]:
    try:
        pattern = re.compile(rest)
    except re.error as error:
        raise _impossible(match, f"{rest!r}: {error}", "a regular expression") from error
    return tuple(layer for layer in layers if pattern.fullmatch(layer.name))


def _first(rest: str, layers: Sequence[Layer], index: LayerIndex, match: str) -> tuple[Layer, ...]:
    return tuple(x for x in layers if index.is_choosable(x))[: _number(rest, match)]


def _last(rest: str, layers: Sequence[Layer], index: LayerIndex, match: str) -> tuple[Layer, ...]:
    return tuple(x for x in layers if index.is_choosable(x))[-_number(rest, match) :]


def _by_block(
    rest: str, layers: Sequence[Layer], index: LayerIndex, match: str
) -> tuple[Layer, ...]:
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", rest)
    if numbers is None:
        return tuple(layer for layer in layers if _is_below(layer.name, rest))
    first = int(numbers[1])
    last = int(numbers[2] or numbers[1])
    if first > last or last >= len(index.blocks):
        n = len(index.blocks)
        expected = f"residual blocks from 0 to {n - 1}" if n else "a model with residual blocks"
        raise _impossible(match, f"block {rest} of {n}", f"{expected}, or block:SCOPE")
    inside = frozenset[str]().union(*index.blocks[first : last + 1])
    return tuple(layer for layer in layers if layer.name in inside)


def _before(rest: str, layers: Sequence[Layer], index: LayerIndex, match: str) -> tuple[Layer, ...]:
    return _among(layers, index, index.adjacency.before([_known(rest, index, match)]))


def _after(rest: str, layers: Sequence[Layer], index: LayerIndex, match: str) -> tuple[Layer, ...]:
    return _among(layers, index, index.adjacency.after([_known(rest, index, match)]))


def _until_compute(
    rest: str, layers: Sequence[Layer], index: LayerIndex, match: str
) -> tuple[Layer, ...]:
    """The layer and what follows it, ending before the next layers that multiply and accumulate."""
    adjacency = index.adjacency
    start = adjacency.host(_known(rest, index, match))
    found, front = {start}, [start]
    while front:
        for name in adjacency.children.get(front.pop(), ()):
            if name not in found and not index.by_name[name].is_compute:
                found.add(name)
                front.append(name)
    return _among(layers, index, found)


_WORDS: dict[str, Callable[[str, Sequence[Layer], LayerIndex, str], tuple[Layer, ...]]] = {
    "layer": _exactly,
    "re": _by_expression,
    "op": _by_type,
    "block": _by_block,
    "first": _first,
    "last": _last,
    "before": _before,
    "after": _after,
    "until_compute": _until_compute,
}


def _among(layers: Sequence[Layer], index: LayerIndex, hosts: set[str]) -> tuple[Layer, ...]:
    return tuple(layer for layer in layers if index.adjacency.host(layer.name) in hosts)


def _is_below(name: str, scope: str) -> bool:
    """Whether some run of the leading parts of a name, all but the last, ends in ``scope``."""
    parts = name.strip("/").split("/")[:-1]
    wanted = scope.strip("/").split("/")
    runs = (parts[i : i + len(wanted)] for i in range(len(parts) - len(wanted) + 1))
    return any(all(map(fnmatchcase, run, wanted)) for run in runs)


def _scopes(index: LayerIndex) -> list[str]:
    return list(
        dict.fromkeys(
            part for layer in index.layers for part in layer.name.strip("/").split("/")[:-1]
        )
    )


def _number(text: str, match: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise _impossible(match, repr(text), "a number from 1 on")
    return int(text)


def _known(name: str, index: LayerIndex, match: str) -> str:
    if name not in index.by_name:
        near: Iterable[str] = close(name, list(index.by_name))
        raise _impossible(match, f"no layer {name!r}", f"a layer such as {', '.join(near)}")
    return name


def _impossible(match: str, got: str, expected: str) -> PlanError:
    return PlanError(
        "QD503",
        where=f"rule {match!r}",
        got=got,
        expected=expected,
        mend="correct the rule; qdist show lists the layers",
    )
