"""Validated configuration in, frozen values of the library out. Hydra ends here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qdist.calibration import CalibrationSettings
from qdist.cli import schema
from qdist.cli.evaluation_words import command_words, plugin_folders
from qdist.cli.sizes import n_bytes
from qdist.cli.tracking import TrackingSpec
from qdist.data.arrays import ArraySource
from qdist.data.function import FunctionSource
from qdist.data.halves import Part, PartName
from qdist.data.images import ImageSource
from qdist.data.preprocess import Preprocess
from qdist.data.source import DataSource
from qdist.data.text import TextSource
from qdist.errors import ConfigError
from qdist.evaluate.builtin import DatasetEvaluation
from qdist.evaluate.command import CommandEvaluation
from qdist.evaluate.custom_metric import ClassEvaluation
from qdist.evaluate.function import FunctionEvaluation
from qdist.evaluate.scorer import Evaluation
from qdist.model.session import Execution
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.knight import layer_threshold_rules
from qdist.plan.dialects.sophgo import float_rules
from qdist.plan.plan_settings import PlanSettings
from qdist.plan.precision import precision
from qdist.plan.rules import Rule
from qdist.plan.selector import is_of_tensors
from qdist.plan.target import Target
from qdist.search.greedy import GreedySettings
from qdist.search.latency import LatencyTable, read_latency_table
from qdist.search.settings import SearchSettings
from qdist.search.space import SpaceSettings
from qdist.search.vendors import icraft_settings
from qdist.stats.spec import GroupRequest, StatisticsSpec
from qdist.store.location import is_url
from qdist.threshold.convergence import Convergence
from qdist.threshold.registry import check_method

HIGH_OPSET = 21
"""What 4- and 16-bit Q/DQ need."""

if TYPE_CHECKING:  # importing Ray costs half a second that --help should not pay
    from actors.session import ClusterSpec


def execution(config: schema.ModelConfig) -> Execution:
    """How the model is run."""
    return Execution(provider=config.provider, n_threads=config.threads)


def source(config: schema.SourceConfig) -> DataSource:
    """A data set. Raises `ConfigError` and `DataError` for settings that cannot be."""
    match config:
        case schema.ArraysConfig():
            return ArraySource(
                path=absolute(config.path),
                inputs=config.inputs,
                labels=config.labels,
                limit=config.limit,
                start=config.start,
                preprocess=preprocess(config.preprocess),
            )
        case schema.ImagesConfig():
            return _images(config)
        case schema.TextConfig():
            return TextSource(
                path=absolute(config.path),
                tokenizer_path=absolute(config.tokenizer_path),
                input_name=config.input_name,
                lengths=tuple(config.lengths),
                n_samples=config.n_samples,
                start_token=config.start_token,
                bos=config.bos,
            )
        case schema.FunctionDataConfig():
            return FunctionSource(target=config.target, arguments=config.arguments)


def evaluation_source(config: schema.DataConfig) -> DataSource:
    """The evaluation set; the calibration set where the user gave no other."""
    if config.evaluation is not None:
        return source(config.evaluation)
    calibration = config.calibration
    if isinstance(calibration, schema.CapturedSamples | schema.RandomSamples):
        raise ConfigError(
            "QD105",
            where="data.evaluation",
            got="no evaluation set",
            expected=f"one beside {calibration.kind} calibration samples",
            mend="add data.evaluation, as in 'data.evaluation={kind: arrays, path: FILE, ...}', or "
            "score with evaluation=command or evaluation=function",
        )
    return source(calibration)


def calibration_source(config: schema.DataConfig) -> DataSource:
    """The calibration set where it is a data set of its own. Raises QD105 for captured and random
    samples, which are made while calibrating."""
    calibration = config.calibration
    if isinstance(calibration, schema.CapturedSamples | schema.RandomSamples):
        raise ConfigError(
            "QD105",
            where="data.calibration",
            got=f"{calibration.kind} samples",
            expected="samples that can be read again",
            mend="give a data set of arrays, images, text or a function, or use qdist tune",
        )
    return source(calibration)


def preprocess(config: schema.PreprocessConfig) -> Preprocess:
    """What turns stored values into model inputs."""
    return Preprocess(
        scale=config.scale,
        mean=tuple(config.mean),
        std=tuple(config.std),
        channel_axis=config.channel_axis,
        transpose=tuple(config.transpose),
        dtype=config.dtype,
    )


def calibration(config: schema.CalibrationConfig) -> CalibrationSettings:
    """How activations are measured. Raises QD104."""
    budget = config.memory_budget
    return CalibrationSettings(
        micro_batch=config.micro_batch,
        shard_samples=config.shard_samples,
        taps=config.taps if isinstance(config.taps, str) else tuple(config.taps),
        on_nan=config.on_nan,
        statistics=StatisticsSpec(groups=tuple(_groups(entry) for entry in config.groups)),
        memory_budget_bytes=None
        if budget is None
        else n_bytes("calibration.memory_budget", budget),
        n_blocks=config.blocks,
        sequence_axes={name: tuple(axes) for name, axes in config.sequence_axes.items()},
    )


def early_stop(config: schema.EarlyStopConfig) -> Convergence:
    """When enough samples are measured. Raises QD104, QD501."""
    return Convergence(
        tolerance=config.tolerance,
        patience=config.patience,
        method=config.method,
        exempt=config.exempt,
    )


def _groups(config: schema.GroupsConfig) -> GroupRequest:
    try:
        return GroupRequest(**config.model_dump())
    except ValueError as error:
        raise ConfigError(
            "QD104",
            where=f"calibration.groups, {config.match}",
            got=str(config.model_dump(exclude_none=True)),
            expected=str(error),
            mend="write {match: PATTERN, axis: 1, group_size: 1}",
        ) from error


def default_choice(config: schema.QuantizationConfig) -> LayerChoice:
    """What every layer gets unless a rule says otherwise. Raises QD501, QD502, QD506, QD507."""
    check_method(config.saturation, config.saturation_parameters)
    return LayerChoice(
        precision=config.precision,
        granularity=config.granularity,
        saturation=config.saturation,
        weight_saturation=config.weight_saturation,
        activation_granularity=config.activation_granularity,
        weight_range_bits=config.weight_range_bits,
        activation_range_bits=config.activation_range_bits,
    )


def rules(config: schema.QuantizationConfig) -> tuple[Rule, ...]:
    """The rules of the configuration in order: those that vendors have options for, then the
    user's own. Raises QD507 for settings that do not go with what a rule takes."""
    named = float_rules(config.fpfwd_inputs, config.fpfwd_outputs, config.fpfwd_blocks)
    if config.layer_threshold is not None:
        named += layer_threshold_rules(config.layer_threshold)
    return (*named, *(_rule(entry) for entry in config.rules))


def _rule(config: schema.RuleConfig) -> Rule:
    settings = config.model_dump(exclude={"match"}, exclude_none=True)
    if config.bounds is not None:
        if len(config.bounds) != 2:
            raise _wrong_length("bounds", config.bounds, "[LOW, HIGH]", "quantization.rules")
        settings["bounds"] = tuple(config.bounds)
    if config.threshold is not None and is_of_tensors(config.match):
        settings["threshold"] = (config.threshold,)
    return Rule(match=config.match, settings=settings)


def rules_files(config: schema.QuantizationConfig) -> tuple[Path, ...]:
    """Vendors' files that are read as rules, in order."""
    given = config.rules_file or []
    return tuple(absolute(path) for path in ([given] if isinstance(given, str) else given))


def plan_settings(config: schema.QuantizationConfig) -> PlanSettings:
    """What holds for the whole model."""
    return PlanSettings(
        scope=config.scope,
        symmetric=config.symmetric,
        masked=config.masked,
        saturation_parameters=config.saturation_parameters,
    )


def target(config: schema.TargetConfig) -> Target:
    """What the toolchain accepts. Raises QD506."""
    for name in config.precisions:
        precision(name)
    return Target(
        name=config.name,
        precisions=tuple(config.precisions),
        symmetric_only=config.symmetric_only,
        per_channel=config.per_channel,
        per_tensor_operators=tuple(config.per_tensor_operators),
        blocks=config.blocks,
        block_sizes=tuple(config.block_sizes),
        tokens=config.tokens,
        activation_channels=config.activation_channels,
        scale_grid=config.scale_grid,
        rounding=config.rounding,
        table_bits=config.table_bits,
        split_bias=config.split_bias,
    )


def evaluation(
    config: schema.EvaluationConfig, data: schema.DataConfig | None, part: PartName | None = None
) -> Evaluation:
    """How models are scored, on all samples or on a part of them (evaluation.search_share).

    Raises QD105 when a metric has no data, QD701.
    """
    match config:
        case schema.MetricConfig():
            return DatasetEvaluation(
                source=evaluation_part(config, evaluation_source(_needed(data)), part),
                metric=config.metric,
                batch=config.batch,
                token_input=config.token_input,
            )
        case schema.CommandConfig():
            words, folder = command_words(config)
            return CommandEvaluation(
                command=tuple(_found_from_elsewhere(word) for word in words),
                folder=absolute(folder) if folder else None,
                timeout_s=config.timeout_s,
                higher_is_better=config.higher_is_better,
                metric=config.metric,
                read=config.read,
                shell=config.shell,
                keep=config.keep,
                environment=config.environment,
            )
        case schema.FunctionConfig():
            return FunctionEvaluation(
                target=config.target,
                higher_is_better=config.higher_is_better,
                arguments=config.arguments,
                metric=config.metric,
                sample_range=config.sample_range,
                stop_risk=config.stop_risk,
            )
        case schema.ClassConfig():
            return ClassEvaluation(
                source=evaluation_part(config, evaluation_source(_needed(data)), part),
                metric_cls=config.metric_cls,
                metric_input=config.metric_input,
                folders=plugin_folders(config.folder),
                replace_output=tuple(config.replace_output),
                batch=config.batch,
            )


def evaluation_part(
    config: schema.MetricConfig | schema.ClassConfig, whole: DataSource, part: PartName | None
) -> DataSource:
    """A part of the evaluation set; all of it where it is not divided."""
    if part is None or config.search_share is None:
        return whole
    return Part(source=whole, part=part, share=config.search_share)


def _needed(data: schema.DataConfig | None) -> schema.DataConfig:
    if data is None:
        raise ConfigError(
            "QD105",
            where="data",
            got="no data",
            expected="a data set for the metric",
            mend="add data=GROUP to the command",
        )
    return data


def scorer_options(config: schema.EvaluationConfig) -> dict[str, int | str | None]:
    """What a user's function finds on its executor."""
    if not isinstance(config, schema.FunctionConfig):
        return {}
    return {
        "batch_size": config.batch_size,
        "iteration": config.iteration,
        "dataset": config.dataset,
    }


def cluster(config: schema.ClusterConfig) -> ClusterSpec:
    """Where workers run."""
    from actors.session import ClusterSpec

    return ClusterSpec(
        address=config.address,
        n_workers=config.workers,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        memory_bytes_per_worker=config.memory_bytes_per_worker,
        ready_timeout_s=config.ready_timeout_s,
        task_timeout_s=config.task_timeout_s,
        max_attempts=config.max_attempts,
        store_patience_s=config.store_patience_s,
        ship_code=config.ship_code,
        pipeline=config.pipeline,
    )


def tracking(config: schema.TrackingConfig) -> TrackingSpec:
    """Where runs are recorded. Raises QD104."""
    return TrackingSpec(
        uri=config.uri,
        experiment=config.experiment,
        artifacts=config.artifacts,
        enabled=config.enabled,
        run_name=config.run_name,
    )


def greedy(config: schema.SearchConfig) -> GreedySettings:
    """How the greedy search goes. Raises QD501, QD506."""
    for name in (config.low, config.high):
        if name is not None:
            precision(name)
    for method in config.saturations:
        check_method(method)
    return GreedySettings(
        low=config.low,
        high=config.high,
        saturations=tuple(config.saturations),
        max_trials=config.max_trials,
        first_share=config.first_share,
    )


def space(
    config: schema.SearchConfig, base: str, target: Target, opset_refusal: str | None
) -> SpaceSettings:
    """What layers may become. ``opset_refusal``: why the model cannot have the opset of 4- and
    16-bit layers. Raises QD501, QD506, QD507, and for Icraft's search what its options raise."""
    wanted = tuple(config.precisions) or tuple(
        name for name in (base, config.low, config.high) if name is not None
    )
    for name in wanted:
        precision(name)
    for method in config.saturations:
        check_method(method)
    grains = dict.fromkeys((*config.granularities, *(("channel",) if target.per_channel else ())))
    for name in grains:
        LayerChoice(granularity=name)
    for name in config.activation_granularities:
        LayerChoice(activation_granularity=name)
    return SpaceSettings(
        precisions=wanted,
        granularities=tuple(grains),
        activation_granularities=tuple(config.activation_granularities),
        saturations=tuple(config.saturations),
        weight_range_bits=tuple(config.weight_range_bits),
        activation_range_bits=tuple(config.activation_range_bits),
        max_opset=None if opset_refusal is None else HIGH_OPSET - 1,
        split_bias=config.strategy == "icraft" and icraft_settings(config.options).splits_bias,
    )


def latency(config: schema.SearchConfig) -> LatencyTable | None:
    """The user's table, where there is one. Raises QD107 where it is missing, QD511."""
    if config.cost != "latency":
        return None
    if config.latency is None:
        raise ConfigError(
            "QD107",
            where="search.cost=latency",
            got="no search.latency",
            expected="a CSV file of operator,dtype,us",
            mend="give search.latency=FILE.csv, or another search.cost",
        )
    return read_latency_table(absolute(config.latency))


def search_settings(
    config: schema.SearchConfig, plain_cost: float, *, per_channel: bool = True
) -> SearchSettings:
    """What a strategy is told. ``plain_cost``: of the plain plan, which a budget in percent is of.
    Raises QD104, QD501, QD506."""
    # What the target would refuse in every trial is not tried.
    own = replace(greedy(config), granularity="channel" if per_channel else None)
    return SearchSettings(
        max_trials=config.max_trials,
        trials_per_round=config.trials_per_round,
        n_budgets=config.n_budgets,
        patience=config.patience,
        budget=_budget(config.budget, plain_cost),
        target=config.target,
        clipping=_clipping(config),
        include_greedy=config.include_greedy,
        greedy=own,
        options=config.options,
    )


def _clipping(config: schema.SearchConfig) -> tuple[str, ...]:
    for method in config.clipping:
        check_method(method, where="search.clipping")
    return tuple(config.clipping)


def _budget(given: float | str | None, plain_cost: float) -> float | None:
    if given is None:
        return None
    text = str(given).strip()
    try:
        value = float(text[:-1]) / 100 * plain_cost if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(
            "QD104",
            where="search.budget",
            got=repr(given),
            expected="a cost, or a share of the plain plan's such as 60%",
            mend="write search.budget=1.5e6 or search.budget=60%",
        )
    return value


def location(path: str) -> str:
    """Where a store is: a URL, or a user's path made absolute."""
    return path if is_url(path) else str(absolute(path))


def absolute(path: str) -> Path:
    """A user's path, made absolute: workers have other working folders."""
    return Path(path).expanduser().absolute()


def _images(config: schema.ImagesConfig) -> ImageSource:
    resize = config.resize
    if isinstance(resize, list):
        resize_to: int | tuple[int, int] | None = pair("resize", resize, "[height, width]")
    else:
        resize_to = resize
    letterbox = None
    if config.letterbox is not None:
        if len(config.letterbox) != 3:
            raise _wrong_length("letterbox", config.letterbox, "[height, width, pad value]")
        letterbox = (config.letterbox[0], config.letterbox[1], config.letterbox[2])
    return ImageSource(
        folder=absolute(config.folder),
        input_name=config.input_name,
        list_file=absolute(config.list_file) if config.list_file else None,
        labels_file=absolute(config.labels_file) if config.labels_file else None,
        resize=resize_to,
        crop=config.crop,
        letterbox=letterbox,
        color=config.color,
        layout=config.layout,
        limit=config.limit,
        start=config.start,
        preprocess=preprocess(config.preprocess),
    )


def pair(name: str, values: list[int], expected: str) -> tuple[int, int]:
    """Two numbers. Raises QD104 for more or fewer."""
    if len(values) != 2:
        raise _wrong_length(name, values, expected)
    return values[0], values[1]


def _wrong_length(
    name: str, values: Sequence[float], expected: str, group: str = "data"
) -> ConfigError:
    return ConfigError(
        "QD104",
        where=f"{group}: {name}",
        got=str(list(values)),
        expected=expected,
        mend=f"give {name}={expected}",
    )


def _found_from_elsewhere(word: str) -> str:
    """A file of the current folder by its absolute path: the command has another working folder."""
    path = Path(word)
    is_file = not path.is_absolute() and not word.startswith("-") and path.is_file()
    return str(path.absolute()) if is_file else word
