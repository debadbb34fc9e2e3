"""What the groups ``data`` may hold: where samples come from, and how they are run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Group(BaseModel):
    """A group of settings: immutable, and no key beside those named."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class PreprocessConfig(Group):
    """(x * scale - mean) / std in float32, after transposing."""

    scale: float = Field(1.0, description="values are multiplied by this first")
    mean: list[float] = Field([], description="then this is taken off, per channel or one for all")
    std: list[float] = Field([], description="then they are divided by this")
    channel_axis: int = Field(0, description="the channels' axis, after transposing")
    transpose: list[int] = Field([], description="the order of axes that the model wants")
    dtype: str = Field("float32", description="the model's input type; keep: as stored")


_KEEP = PreprocessConfig.model_validate({"dtype": "keep"})


class ArraysConfig(Group):
    """Arrays in .npz or .npy files."""

    kind: Literal["arrays"]
    path: str = Field(description="an .npz or .npy file, or a folder of them")
    inputs: dict[str, str] = Field(
        description="which array feeds which input, {model input: key in the file}, "
        "as in 'data.calibration.inputs={images: x}'"
    )
    labels: str | None = Field(None, description="the key of the labels in the file")
    limit: int | None = Field(None, ge=1, description="use so many samples at most")
    start: int = Field(0, ge=0, description="leave out so many samples first")
    preprocess: PreprocessConfig = _KEEP


class ImagesConfig(Group):
    """Image files in a folder."""

    kind: Literal["images"]
    folder: str = Field(description="where the images are")
    input_name: str = Field(description="the model's input")
    list_file: str | None = Field(None, description="a file with one image a line")
    labels_file: str | None = Field(None, description="a CSV file of image and label")
    resize: int | list[int] | None = Field(
        None, description="the shorter side, or [height, width], in pixels"
    )
    crop: int | None = Field(None, ge=1, description="side of the square cut from the middle")
    letterbox: list[int] | None = Field(None, description="[height, width, pad value]")
    color: Literal["RGB", "BGR", "GRAY"] = Field("RGB", description="order of the channels")
    layout: Literal["NCHW", "NHWC"] = Field("NCHW", description="order of the axes")
    limit: int | None = Field(None, ge=1, description="use so many samples at most")
    start: int = Field(0, ge=0, description="leave out so many samples first")
    preprocess: PreprocessConfig = PreprocessConfig.model_validate({})


class TextConfig(Group):
    """Chunks of a tokenized text."""

    kind: Literal["text"]
    path: str = Field(description="the text file")
    tokenizer_path: str = Field(description="the tokenizer's file")
    input_name: str = Field(description="the model's input of token ids")
    lengths: list[int] = Field(description="lengths of the chunks in tokens, used in turn")
    n_samples: int | None = Field(None, ge=1, description="how many chunks; null: all")
    start_token: int = Field(0, ge=0, description="leave out so many tokens first")
    bos: bool = Field(True, description="begin each chunk with the token of beginnings")


class FunctionDataConfig(Group):
    """Samples from the user's own function."""

    kind: Literal["function"]
    target: str = Field(description="module:function or FILE.py:function")
    arguments: dict[str, Any] = Field({}, description="keyword arguments for the function")


SourceConfig = Annotated[
    ArraysConfig | ImagesConfig | TextConfig | FunctionDataConfig, Field(discriminator="kind")
]


class SampleOptions(Group):
    """Which samples of a set are measured, and how they are run."""

    exclude: list[str] = Field([], description="keys or patterns of samples to leave out")
    listed: str | None = Field(None, description="a file with one key a line: only those samples")
    mask_input: str | None = Field(
        None, description="the input that is zero where a position is padding"
    )
    sequence_axes: dict[str, list[int]] = Field(
        {}, description="sequence axes of inputs, from the end, where the model does not name them"
    )
    length_buckets: list[int] = Field(
        [], description="pad samples to the next of these lengths, so that several run together"
    )
    pad_values: dict[str, float] = Field({}, description="what each input is padded with")
    pad_side: Literal["left", "right"] = Field("right", description="where padding goes")
    decode_steps: int | None = Field(
        4,
        ge=0,
        description="tokens decoded one at a time by a model with a cache; null: the samples "
        "bring their own pasts",
    )
    token_input: str = Field("input_ids", description="a decoder's token ids")
    position_input: str = Field("position_ids", description="a decoder's positions")


class ArraySamples(ArraysConfig, SampleOptions):
    """Arrays in .npz or .npy files."""


class ImageSamples(ImagesConfig, SampleOptions):
    """Image files in a folder."""


class TextSamples(TextConfig, SampleOptions):
    """Chunks of a tokenized text."""


class FunctionSamples(FunctionDataConfig, SampleOptions):
    """Samples from the user's own function."""


class CapturedSamples(SampleOptions):
    """What the user's own inference function feeds the model."""

    kind: Literal["captured"]
    target: str = Field(description="module:function or FILE.py:function, called with an executor")
    arguments: dict[str, Any] = Field({}, description="keyword arguments for the function")
    batch_size: int = Field(1, ge=1, description="executor.batch_size")
    iteration: int | None = Field(None, ge=1, description="executor.iteration")
    dataset: str | None = Field(None, description="executor.dataset")


class RandomSamples(SampleOptions):
    """Random numbers, to try a model without data."""

    kind: Literal["random"]
    n_samples: int = Field(32, ge=1, description="how many random samples")
    distribution: Literal["uniform", "normal"] = Field(
        "uniform", description="of float inputs: uniform in [0, 1), or normal"
    )
    ranges: dict[str, list[int]] = Field({}, description="{INPUT: [LOW, HIGH]} of integer inputs")
    sizes: dict[str, int] = Field({}, description="{DIMENSION: SIZE} of named dimensions")
    seed: int = Field(0, ge=0, description="of the random numbers")


SamplesConfig = Annotated[
    ArraySamples | ImageSamples | TextSamples | FunctionSamples | CapturedSamples | RandomSamples,
    Field(discriminator="kind"),
]


class DataConfig(Group):
    """The calibration set and the evaluation set."""

    path: str | None = Field(None, description="what the group's two sets are read from")
    tokenizer: str | None = Field(None, description="the tokenizer's file (text)")
    calibration: SamplesConfig = Field(description="where calibration samples come from")
    evaluation: SourceConfig | None = Field(None, description="where evaluation samples come from")
    max_samples: int | None = Field(None, ge=1, description="calibrate with the first N at most")
    select_num: int | None = Field(
        None, ge=1, description="calibrate with N representative samples (Icraft's autoqset)"
    )
