"""Which groups to quantize by themselves to see what that does to the model's outputs, and what
the answers say: `SearchProblem.divergence` and `SearchProblem.interactions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qdist.digest import digest_json
from qdist.plan.choice import LayerChoice
from qdist.plan.target import ProjectedPlan
from qdist.search.candidates import CandidateTable
from qdist.search.problem import Interaction, SearchProblem
from qdist.simulate.twin_sums import twin_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One or two groups, by their first layers, to be quantized as in ``choices``, all else left
    float. ``names``: of all their layers."""

    groups: tuple[str, ...]
    names: tuple[str, ...]
    choices: tuple[tuple[str, LayerChoice], ...]

    def key(self, projected: ProjectedPlan) -> str:
        """Hex SHA-256 of all that decides the result besides the model. ``projected``: a plan in
        which the layers have these choices."""
        wanted = set(self.names)
        layers = (layer for layer in projected.plan.layers if layer.name in wanted)
        return digest_json([twin_key(layer) for layer in layers])


def group_probes(problem: SearchProblem) -> tuple[Probe, ...]:
    """Every group at its cheapest candidate that is quantized: where an error is largest, it says
    most about how the rest of the model takes it."""
    found = []
    for names, candidates in zip(problem.groups, CandidateTable(problem).candidates, strict=True):
        quantized = [c for c in candidates if not c.choices[0][1].bits.is_float and c.harm > 0]
        if quantized:
            chosen = min(quantized, key=lambda c: (c.cost, c.harm))
            found.append(Probe(groups=(names[0],), names=names, choices=chosen.choices))
    return tuple(found)


def with_divergences(problem: SearchProblem, found: Mapping[Probe, float]) -> SearchProblem:
    """The problem with what was measured for `group_probes`."""
    divergence = {probe.groups[0]: {probe.choices[0][1]: found[probe]} for probe in found}
    return replace(problem, divergence=divergence)


def pair_probes(
    problem: SearchProblem, found: Mapping[Probe, float], n_pairs: int
) -> tuple[tuple[Probe, Probe, Probe], ...]:
    """(one group, another, both): neighbours of which one feeds the other, ``n_pairs`` at most,
    those that harm most together first."""
    group_of = {name: names[0] for names in problem.groups for name in names}
    by_group = {probe.groups[0]: probe for probe in found}
    pairs: dict[tuple[str, str], float] = {}
    for layer in problem.layers:
        for source in layer.sources:
            ends = group_of.get(source), group_of[layer.name]
            if ends[0] is not None and ends[0] != ends[1]:
                first, second = by_group.get(ends[0]), by_group.get(ends[1])
                if first is not None and second is not None:
                    pairs[ends[0], ends[1]] = min(found[first], found[second])
    order = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:n_pairs]
    probes = []
    for a, b in order:
        one, other = by_group[a], by_group[b]
        both = Probe(
            groups=(a, b),
            names=(*one.names, *other.names),
            choices=(*one.choices, *other.choices),
        )
        probes.append((one, other, both))
    return tuple(probes)


def interactions(
    pairs: tuple[tuple[Probe, Probe, Probe], ...], found: Mapping[Probe, float]
) -> tuple[Interaction, ...]:
    """L(both) - L(one) - L(other): what is left of a float model's own divergence is none."""
    return tuple(
        Interaction(
            layers=(one.groups[0], other.groups[0]),
            choices=(one.choices[0][1], other.choices[0][1]),
            value=found[both] - found[one] - found[other],
        )
        for one, other, both in pairs
    )
