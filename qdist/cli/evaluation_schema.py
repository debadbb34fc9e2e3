"""How models are scored, as a configuration says it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from qdist.cli.data_schema import Group


class MetricConfig(Group):
    """A named metric over data.evaluation."""

    kind: Literal["metric"]
    metric: str = Field(description="top1, nll, agreement, cosine, ... (docs/evaluation.md)")
    batch: int = Field(32, ge=1, description="samples per run")
    token_input: str | None = Field(None, description="the input of token ids, for text")
    search_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the samples that tune's search sees; the rest is reported; null: all",
    )


class CommandConfig(Group):
    """The user's own script."""

    # `--batch 8` is words to a command, though YAML reads a number.
    model_config = ConfigDict(coerce_numbers_to_str=True)

    kind: Literal["command"]
    command: list[str] = Field([], description="program and arguments; {model} is the artifact")
    folder: str | None = Field(None, description="copied for every run, which works in the copy")
    evalscript_cmd: str | None = Field(
        None, description="Icraft's name: the command as one line, instead of evaluation.command"
    )
    evalscript_path: str | None = Field(
        None, description="Icraft's name: its folder, instead of evaluation.folder"
    )
    timeout_s: float = Field(3600, gt=0, description="then the whole process group is ended")
    higher_is_better: bool = Field(True, description="which way the metric ranks")
    metric: str | None = Field(None, description="which of several named numbers is the score")
    read: Literal["auto", "stdout", "metrics.txt", "metrics.json"] = Field(
        "auto", description="where the metric is"
    )
    shell: bool = Field(False, description="give the command to /bin/sh")
    keep: bool = Field(False, description="leave the working copy in place")
    environment: dict[str, str] = Field({}, description="variables for the command")


class FunctionConfig(Group):
    """The user's own Python function."""

    kind: Literal["function"]
    target: str = Field(description="module:function or FILE.py:function, called with an executor")
    higher_is_better: bool = Field(True, description="which way the metric ranks")
    metric: str | None = Field(None, description="which of several named numbers is the score")
    arguments: dict[str, Any] = Field({}, description="keyword arguments for the function")
    batch_size: int = Field(1, ge=1, description="executor.batch_size")
    iteration: int | None = Field(None, ge=1, description="executor.iteration")
    dataset: str | None = Field(None, description="executor.dataset")
    sample_range: tuple[float, float] | None = Field(
        None, description="what a yielded score may be, [0,1]; lets losing trials stop early"
    )
    stop_risk: float = Field(
        0.01, gt=0, lt=1, description="chance that a trial is stopped that would not have lost"
    )


class ClassConfig(Group):
    """The user's own class of SlimAI's custom metrics, over the outputs for data.evaluation."""

    kind: Literal["class"]
    metric_cls: str = Field(min_length=1, description="the class, in a file of the same name")
    metric_input: str = Field("", description="what init_params is given")
    folder: str | None = Field(
        None, description="where the file is; null: the environment's CUSTOM_METRIC_PATH"
    )
    replace_output: list[str] = Field(
        [], description="outputs in the order that the class wants; empty: the model's"
    )
    batch: int = Field(8, ge=1, description="samples per run")
    search_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the samples that tune's search sees; the rest is reported; null: all",
    )
    dumped: str | None = Field(
        None, description="score the blobs of this folder of compare.dump instead of a model"
    )


EvaluationConfig = Annotated[
    MetricConfig | CommandConfig | FunctionConfig | ClassConfig, Field(discriminator="kind")
]
