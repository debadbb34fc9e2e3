"""Mixed precision without a search, as the configuration asks for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qdist.cli import domain, schema
from qdist.cli.commands.steps import Chosen
from qdist.cli.context import Context
from qdist.data.source import DataSource
from qdist.errors import ConfigError
from qdist.evaluate.sensitivity import sensitivity
from qdist.model.groups import LayerGroup, find_groups
from qdist.plan.dialects.knight_rules import closure
from qdist.plan.plan import QuantizationPlan
from qdist.plan.target import Target
from qdist.search.pickers.cosine import cosine
from qdist.search.pickers.end_to_end import end_to_end, output_errors
from qdist.search.pickers.hawq import Probes, hawq, traces
from qdist.search.pickers.picking import Picked, PickSettings, closed, raised_choices
from qdist.search.pickers.positions import initial, io_high
from qdist.search.pickers.recurrent import lstm
from qdist.search.pickers.strategies import Mix, find_mix, joined
from qdist.search.pickers.variance import variance
from qdist.simulate.twins import only


def mix_of(config: schema.QuantizationConfig) -> tuple[Mix, PickSettings] | None:
    """The pickers and their settings; None for none. Raises QD104, QD107, QD501, QD506."""
    given = config.mix
    if given is None:
        return None
    names = [given.strategy] if isinstance(given.strategy, str) else given.strategy
    mix = find_mix(names, given.high, config.precision)
    settings = PickSettings(
        high=mix.high,
        low_share=given.low_share,
        threshold=given.threshold,
        high_saturation=given.high_saturation,
    )
    # A precision or method that cannot be is better known before the work.
    default = domain.default_choice(config)
    raised_choices({"": default}, Picked(raised=frozenset({""})), settings)
    return mix, settings


def check_data(mix: Mix, data: schema.DataConfig | None) -> None:
    """Raise QD105 where pickers need samples and there are none."""
    if mix.runs_model and data is None:
        raise ConfigError(
            "QD105",
            where="data",
            got="no samples",
            expected=f"a calibration set to run the model on for {', '.join(mix.strategies)}",
            mend="add data=GROUP to the command, or choose variance, io_high or lstm",
        )


def mixed(
    context: Context[Any],
    chosen: Chosen,
    config: schema.QuantizationConfig,
    target: Target,
    source: DataSource | None,
) -> Chosen:
    """The choices with some layers raised; layers that a rule is about are left as it has them."""
    found = mix_of(config)
    if found is None or config.mix is None:
        return chosen
    mix, settings = found
    index = chosen.planner.index
    free = [
        layer.name
        for layer in index.layers
        if layer.name not in chosen.why and index.can_have(layer, settings.high)
    ]
    low = chosen.planner.plan(chosen.choices, chosen.why)
    low = replace(low, layers=tuple(layer for layer in low.layers if layer.name in free))
    picks = []
    for name in mix.strategies:
        if name == "cosine" and source is not None:
            picks.append(_by_cosine(context, chosen, config.mix, settings, target, source))
        elif name == "end_to_end" and source is not None:
            picks.append(_by_outputs(context, chosen, free, config.mix, settings, target, source))
        elif name == "hawq" and source is not None:
            picks.append(_by_curvature(context, chosen, low, config.mix, settings, source))
        else:
            picks.append(_without_running(name, chosen, low, settings))
    picked = joined(picks)
    picked = replace(picked, raised=picked.raised & set(free))
    picked = _together(picked, config.mix.together, chosen, free)
    label = "+".join(mix.strategies)
    why = {name: f"{label}: {picked.why.get(name, 'raised')}" for name in picked.raised}
    n = len(chosen.planner.choosable())
    note = f"{label} raises {len(picked.raised)} of {n} layers to {mix.high}"
    planner = chosen.planner
    whole = {**chosen.why, **why}
    return replace(
        chosen,
        planner=planner.with_rules(planner.settings.tensors, whole),
        choices=raised_choices(chosen.choices, picked, settings),
        why=whole,
        notes=(*chosen.notes, note, *picked.notes),
    )


def _without_running(
    name: str, chosen: Chosen, low: QuantizationPlan, settings: PickSettings
) -> Picked:
    """What a picker raises that reads the graph and stored statistics alone."""
    planner = chosen.planner
    match name:
        case "variance":
            return variance(low, planner.densities(low), settings)
        case "lstm":
            return lstm(planner.index, settings)
        case "io_high":
            return io_high(planner.index, settings)
        case "initial":
            return initial(planner.index, settings)
    raise ValueError(f"{name} needs samples")


def _by_cosine(
    context: Context[Any],
    chosen: Chosen,
    mix: schema.MixConfig,
    settings: PickSettings,
    target: Target,
    source: DataSource,
) -> Picked:
    planner = chosen.planner
    with context.working("measuring how far each layer alone turns its output"):
        deviations = sensitivity(
            planner.graph.model,
            target.project(planner.plan(chosen.choices)),
            source,
            context.execution,
            batch=mix.batch,
            n_samples=mix.samples,
        )
    free = {n: d for n, d in deviations.items() if n not in chosen.why}
    return cosine(free, settings)


def _by_outputs(
    context: Context[Any],
    chosen: Chosen,
    free: list[str],
    mix: schema.MixConfig,
    settings: PickSettings,
    target: Target,
    source: DataSource,
) -> Picked:
    planner = chosen.planner
    projected = target.project(planner.plan(chosen.choices))
    with context.working("measuring what each layer alone does to the outputs"):
        errors = output_errors(
            planner.graph.model,
            only(projected, set(free)),
            source,
            context.execution,
            batch=mix.batch,
            n_samples=mix.samples,
        )
    return end_to_end(errors, settings)


def _by_curvature(
    context: Context[Any],
    chosen: Chosen,
    low: QuantizationPlan,
    mix: schema.MixConfig,
    settings: PickSettings,
    source: DataSource,
) -> Picked:
    weights = dict.fromkeys(entry.tensor for layer in low.layers for entry in layer.weights)
    with context.working("measuring the curvature along each weight"):
        found = traces(
            chosen.planner.graph.model,
            list(weights),
            source,
            context.execution,
            Probes(n_probes=mix.probes),
            batch=mix.batch,
            n_samples=mix.samples,
        )
    return hawq(low, found, settings)


def _together(picked: Picked, how: str, chosen: Chosen, free: list[str]) -> Picked:
    index = chosen.planner.index
    if how == "none":
        return picked
    groups: tuple[LayerGroup, ...] = ()
    if how == "groups":
        groups = find_groups(index.layers, index.adjacency, among=free)
        return closed(picked, groups, free)
    return closed(picked, (), free, lambda raised: closure(index, raised) & set(free))
