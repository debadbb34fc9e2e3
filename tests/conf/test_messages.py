"""What a mistake in the words of a command gives: one line that says how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import check_error, here, left_behind, process

DIGITS = ("model=digits_cnn", "data=digits", "tracking=none")

MISTAKES: list[tuple[str, tuple[str, ...], str, tuple[str, ...]]] = [
    ("command", ("calibrat",), "QD101", ("'calibrat'", "quantize, evaluate", "qdist calibrate?")),
    ("option", ("quantize", "--verbose"), "QD106", ("--verbose", "--multirun")),
    ("value of an option", ("quantize", "--cfg", "jobs"), "QD106", ("'jobs'", "'job'")),
    (
        "key",
        ("calibrate", "modle=digits_cnn"),
        "QD102",
        ("'modle'", "one of model, tracking", "did you mean model?"),
    ),
    (
        "group of a nested key",
        ("calibrate", *DIGITS, "calibraton.micro_batch=2"),
        "QD102",
        ("'calibraton'", "did you mean calibration?"),
    ),
    (
        "nested key",
        ("calibrate", *DIGITS, "cluster.worker=2"),
        "QD102",
        ("'worker'", "cpus_per_worker", "did you mean cluster.workers?"),
    ),
    (
        "key deep inside",
        ("calibrate", *DIGITS, "data.calibration.preprocess.scal=2"),
        "QD102",
        ("'scal'", "mean, std", "did you mean data.calibration.preprocess.scale?"),
    ),
    (
        "key with a plus",
        ("calibrate", *DIGITS, "+cluster.cpu_per_worker=2"),
        "QD102",
        ("'cpu_per_worker'", "did you mean cluster.cpus_per_worker?"),
    ),
    (
        "key of another command",
        ("emit", "model=digits_cnn", "data=digits"),
        "QD102",
        ("'data'", "target, plan, artifact"),
    ),
    (
        "key in a rule",
        ("quantize", "model=digits_cnn", "quantization.rules=[{match: a, precison: int8}]"),
        "QD102",
        ("'precison'", "match, precision", "did you mean quantization.rules.precision?"),
    ),
    (
        "choice",
        ("calibrate", "model=digits_cn"),
        "QD103",
        ("group model", "digits_cnn, digits_vit, onnx", "model=digits_cnn"),
    ),
    (
        "choice of the default group",
        ("calibrate", *DIGITS, "store=s3"),
        "QD103",
        ("group store", "one of local", "store=local"),
    ),
    (
        "word instead of a number",
        ("calibrate", *DIGITS, "cluster.workers=two"),
        "QD104",
        ("cluster.workers", "'two' (str)", "integer", "how many"),
    ),
    (
        "number below the least",
        ("calibrate", *DIGITS, "calibration.micro_batch=0"),
        "QD104",
        ("calibration.micro_batch", "0 (int)", "greater than or equal to 1"),
    ),
    (
        "value that is none of few",
        ("calibrate", *DIGITS, "calibration.on_nan=ignore"),
        "QD104",
        ("calibration.on_nan", "'ignore'", "'error' or 'report'"),
    ),
    (
        "empty path",
        ("calibrate", *DIGITS, "store.path="),
        "QD104",
        ("store.path", "at least 1 character"),
    ),
    (
        "list for a number",
        ("calibrate", *DIGITS, "model.threads=[1,2]"),
        "QD104",
        ("model.threads", "[1, 2] (list)", "integer"),
    ),
    (
        "kind of data",
        ("calibrate", *DIGITS, "data.calibration.kind=array"),
        "QD104",
        ("data.calibration.kind", "'array'", "'arrays', 'images', 'text', 'function'"),
    ),
    (
        "kind of evaluation",
        ("evaluate", *DIGITS, "evaluation.kind=script"),
        "QD104",
        ("evaluation.kind", "'script'", "'metric', 'command', 'function'"),
    ),
    (
        "no model",
        ("calibrate", "data=digits"),
        "QD105",
        ("model.path", "the ONNX file", "add model.path=VALUE"),
    ),
    (
        "two values missing",
        ("calibrate", "model=digits_cnn"),
        "QD105",
        ("data.calibration.inputs", "also missing: data.path"),
    ),
    (
        "a rule without layers",
        ("quantize", "model=digits_cnn", "quantization.rules=[{precision: int8}]"),
        "QD105",
        ("quantization.rules", "match"),
    ),
    (
        "reference to nothing",
        ("quantize", "model=digits_cnn", "store.path=${stor.path}"),
        "QD106",
        ("store.path", "'stor.path' not found", "${...}"),
    ),
    (
        "reference to an unset variable",
        ("calibrate", *DIGITS, "store.path=${oc.env:QDIST_NOT_SET}"),
        "QD106",
        ("store.path", "'QDIST_NOT_SET' not found"),
    ),
    (
        "reference in a key that no group file has",
        ("calibrate", *DIGITS, "data.calibration.limit=${data.limit}"),
        "QD106",
        ("data.calibration.limit", "'data.limit' not found"),
    ),
    (
        "unbalanced brace",
        ("quantize", "model=digits_cnn", "quantization.saturation_parameters={percent: 99"),
        "QD106",
        ("quantization.saturation_parameters={percent: 99", "key={a: 1}"),
    ),
    ("word without =", ("quantize", "digits_cnn"), "QD106", ("'digits_cnn'", "key=value")),
    ("folder of groups", ("emit", "--config-dir", "nowhere"), "QD106", ("--config-dir", "nowhere")),
    (
        "data of a search that is no metric's",
        ("evaluate", "model=digits_cnn", "data=digits", "evaluation.metric=top2", "artifact=x"),
        "QD701",
        ("'top2'", "top1", "perplexity"),
    ),
]


@pytest.mark.parametrize(
    ("words", "code", "parts"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_gives_one_line(
    words: tuple[str, ...],
    code: str,
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    check_error(here(*words), code, *parts)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "code", "parts"),
    [
        ("pth: model.onnx\n", "QD102", ("'pth'", "did you mean model.path?")),
        ("path: [a, b]\n", "QD104", ("model.path", "(list)", "string")),
        ("path: {a: [1\n", "QD106", ("expected ',' or ']'", "model/mine.yaml", "line 1")),
        ("defaults:\n  - onxn\n", "QD103", ("'onxn'", "model=onnx")),
    ],
    ids=["key", "type", "yaml", "defaults"],
)
def test_mistakes_in_the_users_own_group_file(
    text: str, code: str, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/mine.yaml").write_text(
        text if text.startswith(("defaults", "path: {")) else f"defaults:\n  - onnx\n\n{text}"
    )
    check_error(here("emit", "--config-dir", "mine", "model=mine"), code, *parts)


def test_a_mistake_ends_the_process_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    for words, code in ((("calibrat",), "QD101"), (("calibrate", "modle=digits_cnn"), "QD102")):
        result = process(*words, cwd=tmp_path)
        check_error(result, code)
        assert result.out == ""


def test_help_and_version_print_and_succeed() -> None:
    for words, expected in (
        ([], "usage: qdist COMMAND"),
        (["--help"], "usage: qdist COMMAND"),
        (["--version"], "qdist 0"),
        (["show", "--help"], "usage: qdist show PATH"),
        (["tune", "model=digits_cnn", "-h"], "usage: qdist tune"),
    ):
        result = here(*words)
        assert (result.status, result.err) == (0, "")
        assert expected in result.out
