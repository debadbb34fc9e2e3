"""The calibration samples as the configuration asks for them: a source, wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qdist.calibration import CalibrationSettings, input_specs
from qdist.cli import domain, schema
from qdist.cli.context import Context
from qdist.data.captured import Capture, capture
from qdist.data.checks import InputSpec
from qdist.data.decoder import Decoder, Phased, find_decoder
from qdist.data.random_source import RANDOM_WARNING, RandomSource
from qdist.data.sequence import Bucketed, Trimmed, sequence_axes
from qdist.data.source import DataSource
from qdist.data.subset import Excluded, Limited, Listed
from qdist.errors import ConfigError, DataError
from qdist.model.graph import Graph
from qdist.model.taps import MODES

CAPTURED = "captured"
"""Folder of what the user's inference function fed, in the output folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """``chosen``: the samples, before anything is cut, padded or run in phases. ``source``: what is
    measured of them. ``settings``: how. ``notes``: what the user should know."""

    chosen: DataSource
    source: DataSource
    settings: CalibrationSettings
    notes: tuple[str, ...]


def samples(
    data: schema.DataConfig,
    calibration: schema.CalibrationConfig,
    graph: Graph,
    context: Context[schema.CalibrateSettings] | Context[schema.TuneSettings],
) -> Samples:
    """What ``data.calibration`` describes. Raises `ConfigError` and `DataError`."""
    config = data.calibration
    inputs = input_specs(graph)
    decoder = _decoder(config, graph, inputs)
    base, notes = _base(config, graph, inputs, decoder, context)
    chosen = _chosen(base, config, data.max_samples)
    settings = replace(
        domain.calibration(calibration),
        taps=_taps(calibration.taps),
        mask_input=config.mask_input,
        bucketed=bool(config.length_buckets),
    )
    _refuse_unused(config, settings, inputs)
    source = _sized(chosen, config, inputs)
    if decoder is not None:
        source = Phased(source=source, decoder=decoder)
        notes = (
            *notes,
            f"measured as a prefill and {config.decode_steps} decode steps of one token each",
        )
    return Samples(chosen=chosen, source=source, settings=settings, notes=notes)


def _decoder(
    config: schema.SampleOptions, graph: Graph, inputs: tuple[InputSpec, ...]
) -> Decoder | None:
    """How samples are run by a model with a cache, unless they bring their own pasts."""
    if config.decode_steps is None:
        return None
    return find_decoder(
        inputs,
        graph.output_names,
        n_steps=config.decode_steps,
        token_input=config.token_input,
        position_input=config.position_input,
        **({"mask_input": config.mask_input} if config.mask_input else {}),
    )


def _refuse_unused(
    config: schema.SampleOptions, settings: CalibrationSettings, inputs: tuple[InputSpec, ...]
) -> None:
    """Raise QD105 for settings of padding without a mask, QD307 for those of no input."""
    padding: dict[str, Mapping[str, object]] = {
        "data.calibration.sequence_axes": config.sequence_axes,
        "data.calibration.pad_values": config.pad_values,
    }
    for key, given in {**padding, "calibration.sequence_axes": settings.sequence_axes}.items():
        if given and config.mask_input is None:
            raise ConfigError(
                "QD105",
                where="data.calibration.mask_input",
                got=f"no mask for {key}",
                expected="the input that tells the model which positions are padding",
                mend="add data.calibration.mask_input=attention_mask",
            )
    known = [spec.name for spec in inputs]
    for key, given in padding.items():
        strangers = sorted(set(given) - set(known))
        if strangers:
            raise DataError(
                "QD307",
                where=key,
                got=", ".join(strangers),
                expected=f"inputs of the model: {', '.join(known)}",
                mend="correct the name, or remove the entry",
            )


def _taps(wanted: str | list[str]) -> str | tuple[str, ...]:
    """All, compute, or names and patterns, of which one may stand for itself. Raises QD105."""
    if isinstance(wanted, str) and wanted in MODES:
        return wanted
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if not names or not all(names):
        raise ConfigError(
            "QD105",
            where="calibration.taps",
            got="an empty name" if names else "an empty list",
            expected="all, compute, or names and patterns of tensors or layers",
            mend="write calibration.taps=all, or 'calibration.taps=[NAME, PATTERN]'",
        )
    return names


def _base(
    config: schema.SamplesConfig,
    graph: Graph,
    inputs: tuple[InputSpec, ...],
    decoder: Decoder | None,
    context: Context[schema.CalibrateSettings] | Context[schema.TuneSettings],
) -> tuple[DataSource, tuple[str, ...]]:
    match config:
        case schema.RandomSamples():
            source = RandomSource(
                # Masks, positions and pasts follow from the tokens.
                inputs=inputs if decoder is None else decoder.sample_specs({}),
                n_samples=config.n_samples,
                distribution=config.distribution,
                ranges={
                    name: domain.pair(f"ranges.{name}", ends, "[lowest, past the highest]")
                    for name, ends in config.ranges.items()
                },
                sizes=config.sizes,
                seed=config.seed,
            )
            return source, (RANDOM_WARNING,)
        case schema.CapturedSamples():
            return _captured(config, graph, inputs, context)
        case _:
            return domain.source(config), ()


def _captured(
    config: schema.CapturedSamples,
    graph: Graph,
    inputs: tuple[InputSpec, ...],
    context: Context[schema.CalibrateSettings] | Context[schema.TuneSettings],
) -> tuple[DataSource, tuple[str, ...]]:
    call = Capture(
        target=config.target,
        arguments=config.arguments,
        batch_size=config.batch_size,
        iteration=config.iteration,
        dataset=config.dataset,
    )
    with context.working(f"running {config.target} to see what it feeds the model"):
        found = capture(call, graph, inputs, context.execution, context.folder / CAPTURED)
    text = f"{found.n_samples} samples from {config.target}"
    if found.reused:
        text += ", captured by an earlier run"
    elif found.n_repeated:
        text += f"; {found.n_repeated} more repeat one of them and count once"
    return found.source, (text,)


def _chosen(
    source: DataSource, config: schema.SampleOptions, max_samples: int | None
) -> DataSource:
    """The samples that the user wants, as they are."""
    if config.exclude:
        source = Excluded(source=source, exclude=tuple(config.exclude))
    if config.listed is not None:
        source = Listed(source=source, list_file=domain.absolute(config.listed))
    if max_samples is not None:
        source = Limited(source=source, max_samples=max_samples)
    return source


def _sized(
    source: DataSource, config: schema.SampleOptions, inputs: tuple[InputSpec, ...]
) -> DataSource:
    """Padding cut off, where the model takes other lengths, or made up to a few lengths."""
    mask = config.mask_input
    if mask is None:
        if config.length_buckets:
            raise ConfigError(
                "QD105",
                where="data.calibration.mask_input",
                got="no mask for data.calibration.length_buckets",
                expected="the input that tells the model which positions are padding",
                mend="add data.calibration.mask_input=attention_mask",
            )
        return source
    spec = next((each for each in inputs if each.name == mask), None)
    # A model of one length runs its padding, which is left out when counting.
    is_fixed = spec is not None and spec.shape is not None and isinstance(spec.shape[-1], int)
    axes = {name: tuple(own) for name, own in config.sequence_axes.items()}
    if not axes and not (is_fixed and not config.length_buckets):
        first = source.load(source.keys()[0])
        axes = sequence_axes(inputs, mask, first, fixed=is_fixed)
    if not is_fixed:
        source = Trimmed(source=source, mask_input=mask, axes=axes)
    if config.length_buckets:
        source = Bucketed(
            source=source,
            mask_input=mask,
            lengths=tuple(config.length_buckets),
            axes=axes,
            pad_values=config.pad_values,
            mask_dtype=spec.dtype if spec is not None else "int64",
            side=config.pad_side,
        )
    return source
