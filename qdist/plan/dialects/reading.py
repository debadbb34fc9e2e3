"""What a vendor's file comes to, the choices before it, and how its mistakes are told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdist.errors import PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.dtype_name import DtypeName, dtype_name
from qdist.plan.layer_index import LayerIndex
from qdist.plan.rules import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRules:
    """The rules of a file, in order, and what the user should know about what gave none."""

    rules: tuple[Rule, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """The model, and what every layer has before the file is read."""

    index: LayerIndex
    choices: Mapping[str, LayerChoice]

    def layer_rule(self, layer: str, settings: Mapping[str, Any], origin: str) -> list[Rule]:
        """A rule for what of ``settings`` the layer does not have already: one or none."""
        choice = self.choices[layer]
        new = {
            name: value
            for name, value in settings.items()
            if value != getattr(choice, name, None)
            and not (name == "weight_saturation" and value == choice.weight_method)
        }
        if "precision" in new and "weight_saturation" not in new:
            # What auto comes to depends on the bits, so it is settled after they are.
            new |= {k: v for k, v in settings.items() if k == "weight_saturation"}
        return [Rule(match=f"layer:{layer}", settings=new, origin=origin)] if new else []

    def output_rule(
        self,
        layer: str,
        settings: Mapping[str, Any],
        origin: str,
        alike: Collection[str] = (),
    ) -> list[Rule]:
        """A rule for the output of ``layer``, for what the layers that read it do not have.

        ``alike``: threshold methods that the file has one word for, so that any of them stays.
        """
        children = self.index.adjacency.children[self.index.adjacency.host(layer)]
        return self._tensor_rule(f"output:layer:{layer}", children, settings, origin, alike)

    def input_rule(
        self,
        tensor: str,
        settings: Mapping[str, Any],
        origin: str,
        alike: Collection[str] = (),
    ) -> list[Rule]:
        """The same for a tensor, by the layers that read it under this name."""
        match = f"tensor:{exactly(tensor)}"
        return self._tensor_rule(match, self.readers(tensor), settings, origin, alike)

    def readers(self, tensor: str) -> tuple[str, ...]:
        """The layers that read a tensor by its name and can be quantized."""
        return self.index.readers.get(tensor, ())

    def method_after(self, children: Iterable[str]) -> str | None:
        """The threshold method that the layers which read a tensor use (the first, where they
        differ); None where none that can be quantized reads it."""
        return next(
            (self.choices[n].saturation for n in children if n not in self.index.left_out), None
        )

    def _tensor_rule(
        self,
        match: str,
        children: Iterable[str],
        settings: Mapping[str, Any],
        origin: str,
        alike: Collection[str],
    ) -> list[Rule]:
        reading = [n for n in children if n not in self.index.left_out]
        if not reading:
            return []
        methods = {self.choices[name].saturation for name in reading}
        wanted = settings.get("saturation")
        has_it = methods == {wanted} or (wanted in alike and methods <= set(alike))
        new = {k: v for k, v in settings.items() if not (k == "saturation" and has_it)}
        return [Rule(match=match, settings=new, origin=origin)] if new else []


def exactly(name: str) -> str:
    """A pattern that a name alone matches."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def note_of(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """A note that ends in the first three of the names it is about; none where there are none."""
    return (f"{text} {', '.join(names[:3])}",) if names else ()


def line_of(file: str, line: int) -> str:
    """How a place in a file is told."""
    return f"{file} line {line}"


def refuse(where: str, got: str, expected: str, mend: str = "correct the file there") -> PlanError:
    """The QD508 for a mistake in a file of rules, to be raised."""
    return PlanError("QD508", where=where, got=got, expected=expected, mend=mend)


def known_dtype(text: str, where: str) -> DtypeName:
    """The number format that a file names. Raises QD506."""
    found = dtype_name(text)
    if found is None:
        raise PlanError(
            "QD506",
            where=where,
            got=repr(text),
            expected=f"one of {', '.join(DtypeName)}",
            mend="correct the file there",
        )
    return found


def cannot_write(form: str, layer: str, got: str, expected: str) -> PlanError:
    """The QD507 for a choice that a vendor's file has no word for, to be raised."""
    return PlanError(
        "QD507",
        where=f"layer {layer}, {form}",
        got=got,
        expected=expected,
        mend="write the template from other choices, or take another form",
    )
