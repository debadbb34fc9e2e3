"""What a configuration may hold. One class a group; unknown keys are refused.

The description of every key is what ``qdist COMMAND --help`` prints.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

from qdist.cli.data_schema import (
    ArraySamples,
    ArraysConfig,
    CapturedSamples,
    DataConfig,
    FunctionDataConfig,
    FunctionSamples,
    Group,
    ImageSamples,
    ImagesConfig,
    PreprocessConfig,
    RandomSamples,
    SampleOptions,
    SamplesConfig,
    SourceConfig,
    TextConfig,
    TextSamples,
)
from qdist.cli.evaluation_schema import (
    ClassConfig,
    CommandConfig,
    EvaluationConfig,
    FunctionConfig,
    MetricConfig,
)
from qdist.cli.search_schema import SearchConfig
from qdist.threshold.registry import METHODS

Strength = Annotated[float, Field(ge=0, le=1)]
"""SmoothQuant's alpha."""


class ModelConfig(Group):
    """The float model."""

    name: str = Field(min_length=1, description="names the output folder")
    path: str = Field(min_length=1, description="the ONNX file; external data lies beside it")
    provider: str = Field("CPUExecutionProvider", description="ONNX Runtime execution provider")
    threads: int = Field(1, ge=1, description="intra-op threads of each session")


class GroupsConfig(Group):
    """Histograms per channel or group of channels, for the tensors whose names match."""

    match: str = Field(min_length=1)
    axis: int
    group_size: int | None = Field(None, ge=1)
    group_count: int | None = Field(None, ge=1)
    mantissa_bits: int = Field(3, ge=0, le=7)


class EarlyStopConfig(Group):
    """When enough samples are measured; decided on complete prefixes of the samples."""

    tolerance: float = Field(
        0.02, gt=0, description="largest relative change of a threshold that counts as none"
    )
    patience: int = Field(2, ge=1, description="checks in a row without change")
    exempt: float = Field(0.0, ge=0, lt=1, description="share of the tensors that may still move")
    method: str = Field("mse", description="threshold method, as quantization.saturation")


class CalibrationConfig(Group):
    """How activations are measured."""

    micro_batch: int = Field(4, ge=1, description="samples per run of the model, at most")
    shard_samples: int | None = Field(
        None, ge=1, description="samples per shard, the unit of work; null: by their number"
    )
    taps: str | list[str] = Field(
        "all",
        description="all activations, compute (what matmul- and conv-like layers read), "
        "or [NAME|PATTERN|LAYER, ...]",
    )
    on_nan: Literal["error", "report"] = Field("error", description="what a NaN activation does")
    memory_budget: StrictInt | str | None = Field(
        None,
        description="what a worker may hold, 2GB or bytes; a larger model runs in segments",
    )
    groups: list[GroupsConfig] = Field(
        [],
        description="histograms per channel or group too, "
        "[{match: PATTERN, axis: 1, group_size: 1}, ...]",
    )
    blocks: int = Field(
        1,
        ge=1,
        description="equal blocks of samples kept apart, for quantization.average_blocks "
        "(Icraft's batch)",
    )
    sequence_axes: dict[str, list[int]] = Field(
        {}, description="{TENSOR: [AXIS, ...]}: where padding lies, if shapes do not tell"
    )
    smoothing: Strength | list[Strength] = Field(
        [],
        description="measure for quantization.smoothing too: 0.5 or [0.3, 0.5], one more run of "
        "the float model each",
    )
    early_stop: EarlyStopConfig | None = Field(
        None, description="stop when thresholds no longer move, {tolerance: 0.01}; null: never"
    )


class StoreConfig(Group):
    """Where statistics are kept."""

    path: str = Field(
        min_length=1,
        description="a folder or s3://, gs://, az:// URL; one store holds one calibration",
    )


class RuleConfig(Group):
    """Settings for some layers or tensors; later rules win."""

    match: str = Field(min_length=1)
    precision: str | None = None
    granularity: str | None = None
    activation_granularity: str | None = None
    weight_range_bits: int | None = None
    activation_range_bits: int | None = None
    saturation: str | None = None
    weight_saturation: str | None = None
    th_scale: float | None = Field(None, gt=0)
    threshold: float | None = Field(None, gt=0)
    bounds: list[float] | None = None
    table_bits: int | None = None
    split_bias: bool | None = None


class MixConfig(Group):
    """Mixed precision without a search."""

    strategy: str | list[str] = Field(
        description="initial, io_high, hawq, cosine, end_to_end, variance, lstm, some of them, or "
        "Icraft's defaults: buyi, zhuge"
    )
    high: str = Field("auto", description="precision to raise layers to; auto: the next one up")
    low_share: float | None = Field(
        None, ge=0, le=1, description="share of the layers that are not raised"
    )
    threshold: float | None = Field(
        None,
        description="raise below this cosine, or variance, or above this share of the outputs' "
        "energy (end_to_end); null: the strategy's own",
    )
    high_saturation: str | None = Field(
        None, description="threshold method of raised layers; null: theirs"
    )
    together: Literal["none", "groups", "knight"] = Field(
        "none",
        description="raise what must agree too: concats, residual sums and Q/K/V, or by Knight's "
        "rules",
    )
    samples: int = Field(
        32, ge=1, description="samples of hawq, cosine and end_to_end, which run the model"
    )
    batch: int = Field(8, ge=1, description="samples per run")
    probes: int = Field(4, ge=1, description="random directions per weight, for hawq")


class QuantizationConfig(Group):
    """What every layer gets unless a rule says otherwise."""

    precision: str = Field(
        "int8",
        description="int8, uint8, int16, uint16, int4, uint4, w4a8, u4a8, w4a16, w8a16 (weights, "
        "activations), w4, u4, w8 (weights alone), bf16, fp16, tf32, fp8_e4m3, fp8_e5m2 or float32",
    )
    granularity: str = Field(
        "channel",
        description="what shares a weight scale: tensor, channel, group=N (groups of channels), "
        "block=N (values of a matrix column)",
    )
    activation_granularity: str = Field(
        "tensor",
        description="what shares an activation scale: tensor, channel, group=N (of channels), "
        "token (found at run time)",
    )
    weight_range_bits: int | None = Field(
        None, description="use so many of a weight's bits (Icraft's value_range)"
    )
    activation_range_bits: int | None = Field(
        None, description="use so many of an activation's bits"
    )
    saturation: str = Field(
        "auto",
        description=f"range of activations: {', '.join(METHODS)}, or a vendor's name; parameters "
        "may follow, percentile:99.9",
    )
    saturation_parameters: dict[str, Any] = Field(
        {},
        description="of the method, e.g. {percent: 99.99}; with any {th_scale: F, threshold: T}",
    )
    weight_saturation: str = Field(
        "auto", description="range of weights, any such method; auto is mse for 4 bits, else max"
    )
    symmetric: bool = Field(False, description="activations with zero point 0")
    masked: Literal["float", "quantize"] = Field(
        "float", description="scores with masked values stay float, or what a Softmax reads of them"
    )
    smoothing: float | None = Field(
        None,
        ge=0,
        le=1,
        description="SmoothQuant's alpha, 0..1: move that much of a matmul input's range into its "
        "weights (Icraft's smooth_alpha); null: off",
    )
    average_blocks: bool = Field(
        False, description="ranges are means over calibration.blocks (Icraft's batch)"
    )
    scope: Literal["all", "compute"] = Field(
        "all", description="every layer that chips compute in integers, or matmul- and conv-like"
    )
    rules: list[RuleConfig] = Field(
        [], description="[{match: NAME|PATTERN|op:TYPE, precision: ...}, ...], the last match wins"
    )
    rules_file: str | list[str] | None = Field(
        None, description="vendors' files, read as rules before quantization.rules"
    )
    rules_form: str | None = Field(
        None,
        description="their form: icraft, icraft_saturation, knight, slimai, slimai_profile or "
        "sophgo; null: by content",
    )
    mix: MixConfig | None = Field(
        None, description="raise some layers, {strategy: variance, low_share: 0.8}; null: none"
    )
    fpfwd_inputs: list[str] = Field(
        [], description="layers that stay float with all before them (Sophgo)"
    )
    fpfwd_outputs: list[str] = Field(
        [], description="layers that stay float with all after them (Sophgo)"
    )
    fpfwd_blocks: list[str] = Field(
        [], description="layers that stay float with those up to the next that computes (Sophgo)"
    )
    layer_threshold: float | None = Field(
        None, gt=0, description="largest magnitude around LayerNormalization (Knight's -lt)"
    )


class TargetConfig(Group):
    """What the toolchain accepts."""

    name: str = Field(description="recorded with the artifact")
    precisions: list[str] = Field(description="precisions it supports")
    symmetric_only: bool = Field(False, description="refuse zero points other than 0")
    per_channel: bool = Field(True, description="allow a weight scale per output channel")
    per_tensor_operators: list[str] = Field(
        [], description="operators whose weights have one scale nevertheless"
    )
    blocks: bool = Field(True, description="allow a weight scale for every N values")
    block_sizes: list[int] = Field([], description="these N; empty: any")
    tokens: bool = Field(True, description="allow an activation scale per token")
    activation_channels: bool = Field(True, description="allow an activation scale per channel")
    scale_grid: Literal["float", "power_of_two", "m*2^-n"] = Field(
        "float", description="allowed scales; m*2^-n: Icraft's cuts"
    )
    rounding: Literal["half_even", "half_away"] = Field(
        "half_even", description="of weights that lie midway"
    )
    table_bits: int | None = Field(
        None,
        ge=8,
        le=12,
        description="functions of 16-bit tensors are tables of 2^N entries (target-exact mode)",
    )
    split_bias: bool = Field(
        False, description="allow the bias of an int16 convolution as an Add of its own"
    )


class CompareConfig(Group):
    """How layers are compared."""

    samples: int = Field(32, ge=1, description="how many of data.evaluation's samples")
    batch: int = Field(8, ge=1, description="samples per run")
    limit: int = Field(20, ge=1, description="rows to print; all go into the files")
    dump: Literal[0, 1, 2, 3] = Field(
        0, description="files for other tools: 1 float outputs, 2 quantized too, 3 every layer"
    )
    dump_samples: int = Field(4, ge=1, description="samples to dump")
    target_exact: bool = Field(
        False, description="compare the artifact with the chip's whole numbers too (modes.json)"
    )


class ClusterConfig(Group):
    """Where workers run."""

    address: str | None = Field(None, description="null: a Ray of our own; auto, HOST:PORT, ray://")
    workers: int = Field(2, ge=1, description="how many")
    cpus_per_worker: float = Field(1, gt=0, description="cores each reserves")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs each reserves")
    memory_bytes_per_worker: int | None = Field(None, ge=1, description="memory each reserves")
    ready_timeout_s: float = Field(120, gt=0, description="to start")
    task_timeout_s: float = Field(3600, gt=0, description="for one shard or one trial")
    max_attempts: int = Field(3, ge=1, description="per shard or trial")
    store_patience_s: float = Field(
        120, ge=0, description="to wait for a store that cannot be reached"
    )
    ship_code: bool = Field(False, description="send this checkout's code to the nodes")
    pipeline: bool = Field(
        False,
        description="give each worker some of the model's segments, so that none holds all of it",
    )


class TrackingConfig(Group):
    """MLflow."""

    enabled: bool = Field(True, description="record runs")
    uri: str = Field(description="sqlite:///FILE or http(s)://SERVER")
    experiment: str = Field("qdist", description="created if missing")
    artifacts: Literal["all", "front", "best", "none"] = Field(
        "all",
        description="whose models are sent: of all trials, of the front with the best, the best, "
        "none",
    )
    run_name: str | None = Field(None, description="of the parent run")


class OutputConfig(Group):
    """Where files go."""

    root: str = Field(min_length=1, description="holds one folder a model, and the MLflow database")
    folder: str = Field(min_length=1, description="this model's plan, artifact and reports")


class CommandSettings(Group):
    """What all commands have."""

    model: ModelConfig
    tracking: TrackingConfig
    output: OutputConfig


class CalibrateSettings(CommandSettings):
    """Measure every activation of the float model on the calibration set.

    Ray workers pull shards, run the model with its activations as outputs, and commit histograms
    to the store. A run that was stopped goes on where it was; what is measured is not measured
    again.
    """

    data: DataConfig
    calibration: CalibrationConfig
    store: StoreConfig
    cluster: ClusterConfig


class QuantizeSettings(CommandSettings):
    """Choose ranges from the stored statistics; write the plan and the quantized model.

    Never runs the float model (but for quantization.mix with hawq or cosine, which need data): any
    method and precision comes from one calibration.
    """

    data: DataConfig | None = None
    store: StoreConfig
    quantization: QuantizationConfig
    target: TargetConfig
    template: str | None = Field(
        None,
        description="write a file of rules to edit, and no model: icraft, icraft_sample, "
        "icraft_manual, knight, slimai, slimai_profile or sophgo (also --template FORM)",
    )
    template_into: str | None = Field(
        None,
        description="with template=sophgo or slimai_profile: your own prototxt, or a profile that "
        "the tool dumped; a copy is written with nothing but those fields changed",
    )


class EvaluateSettings(CommandSettings):
    """Score the float model and the quantized one with a metric, your script or your function."""

    data: DataConfig | None = None
    evaluation: EvaluationConfig
    artifact: str = Field(min_length=1, description="the quantized model to score")


class CompareSettings(CommandSettings):
    """Compare the quantized model with the float one, layer by layer, the worst first.

    Each layer twice: alone (fed by float activations) and in place (fed by the quantized model's).
    """

    data: DataConfig
    target: TargetConfig
    compare: CompareConfig
    plan: str = Field(min_length=1, description="the plan to compare")


class TuneSettings(CommandSettings):
    """Calibrate where needed, then search for a better mixed-precision plan.

    Trials run in parallel on Ray workers, each scored by the evaluation and logged to MLflow as a
    child run with its plan and artifact.
    """

    data: DataConfig
    calibration: CalibrationConfig
    store: StoreConfig
    quantization: QuantizationConfig
    target: TargetConfig
    search: SearchConfig
    evaluation: EvaluationConfig
    compare: CompareConfig
    cluster: ClusterConfig


class EmitSettings(CommandSettings):
    """Write the artifact of a plan for a target."""

    target: TargetConfig
    plan: str = Field(min_length=1, description="the plan to write")
    artifact: str = Field(min_length=1, description="where to write it")
    mode: Literal["artifact-exact", "target-exact"] = Field(
        "artifact-exact", description="the model that ships, or a simulation of the chip's integers"
    )


COMMANDS: dict[str, type[CommandSettings]] = {
    "calibrate": CalibrateSettings,
    "quantize": QuantizeSettings,
    "evaluate": EvaluateSettings,
    "compare": CompareSettings,
    "tune": TuneSettings,
    "emit": EmitSettings,
}
"""Command -> its configuration. ``show`` takes paths instead."""

IDENTITY_KEYS = frozenset(
    {"model.path", "model.provider", "model.threads", "data.calibration"}
    | {"calibration.micro_batch", "calibration.groups", "calibration.sequence_axes"}
)
"""Keys of `CalibrateSettings` that can change a count, so that they are part of the identity."""
NOT_IDENTITY_KEYS = frozenset(
    {"model.name", "data.path", "data.tokenizer", "data.evaluation"}
    | {"data.max_samples", "data.select_num"}
    # Taps are answered for one by one, and what is left out or chosen changes no sample's result.
    | {"calibration.taps", "calibration.shard_samples", "calibration.on_nan"}
    | {"calibration.memory_budget", "calibration.blocks", "calibration.early_stop"}
    # Other models, with stores of their own.
    | {"calibration.smoothing"}
    | {"store.path", "output.root", "output.folder"}
    | {f"cluster.{name}" for name in ClusterConfig.model_fields}
    | {f"tracking.{name}" for name in TrackingConfig.model_fields}
)
"""All its other keys. A test fails on a key that is in neither set."""

__all__ = [
    "COMMANDS",
    "IDENTITY_KEYS",
    "NOT_IDENTITY_KEYS",
    "ArraySamples",
    "ArraysConfig",
    "CalibrateSettings",
    "CalibrationConfig",
    "CapturedSamples",
    "ClassConfig",
    "ClusterConfig",
    "CommandConfig",
    "CommandSettings",
    "CompareConfig",
    "CompareSettings",
    "DataConfig",
    "EarlyStopConfig",
    "EmitSettings",
    "EvaluateSettings",
    "EvaluationConfig",
    "FunctionConfig",
    "FunctionDataConfig",
    "FunctionSamples",
    "Group",
    "GroupsConfig",
    "ImageSamples",
    "ImagesConfig",
    "MetricConfig",
    "MixConfig",
    "ModelConfig",
    "OutputConfig",
    "PreprocessConfig",
    "QuantizationConfig",
    "QuantizeSettings",
    "RandomSamples",
    "RuleConfig",
    "SampleOptions",
    "SamplesConfig",
    "SearchConfig",
    "SourceConfig",
    "StoreConfig",
    "TargetConfig",
    "TextConfig",
    "TextSamples",
    "TrackingConfig",
    "TuneSettings",
]
