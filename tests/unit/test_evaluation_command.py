"""Evaluation commands, run as real processes: what they say, how they fail, how they end."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qdist.errors import ArtifactError, ConfigError
from qdist.evaluate.command import CommandError, CommandEvaluation
from qdist.evaluate.evaluation_run import EvaluationRun
from qdist.evaluate.result import parse_numbers
from tests.user_commands import command, failure, python


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a model.onnx"
    path.write_bytes(b"the artifact")
    return path


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's evaluation folder, in which `script` writes."""
    path = tmp_path / "user"
    path.mkdir()
    return path


def test_the_last_line_of_stdout_is_the_metric(model: Path, scratch: Path) -> None:
    text = "import sys; print('loading'); print('top1: 0.75\\n'); print('warned', file=sys.stderr)"
    report = python(text).run(model, scratch)
    assert (report.score, report.metric, report.metrics) == (0.75, "top1", {"top1": 0.75})
    assert report.mode == "artifact-exact"
    assert report.n_samples is None
    assert 0 < report.seconds < 60
    assert report.run == EvaluationRun(
        exit_status=0, seconds=report.seconds, output_tail=report.log
    )
    assert "loading" in report.log
    assert "warned" in report.log
    assert list(scratch.iterdir()) == []


def test_the_command_is_told_the_model_and_its_folder(model: Path, scratch: Path) -> None:
    text = """
import json, os, sys
assert open(sys.argv[1]).read() == "the artifact"
assert sys.argv[1] == os.environ["QDIST_MODEL"]
assert sys.argv[2] == "--out=" + os.environ["QDIST_WORK"] + "/{x}"
assert os.getcwd() == os.environ["QDIST_WORK"]
assert os.environ["MINE"] == "yes"
assert sys.stdin.read() == ""
print(1)
"""
    evaluation = python(text, "{model}", "--out={work}/{x}", environment={"MINE": "yes"})
    assert evaluation.run(model, scratch).score == 1
    relative = Path(os.path.relpath(model))
    assert evaluation.run(relative, scratch).score == 1


def test_a_shell_only_on_request(model: Path, scratch: Path) -> None:
    script = "cat {model} | wc -c > metrics.txt; echo $((40 + 2))"
    assert command(script, shell=True, read="stdout").run(model, scratch).score == 42
    assert command(script, shell=True).run(model, scratch).score == len("the artifact")
    assert command("echo", "3; echo $HOME", read="stdout").command == ("echo", "3; echo $HOME")
    assert failure(command("echo", "3; echo 4"), model, scratch).code == "QD704"


def test_metrics_txt_as_icraft_has_it(model: Path, scratch: Path, folder: Path) -> None:
    (folder / "test.py").write_text(
        "open('metrics.txt', 'w').write('80.5\\n79.0\\n'); print('done: 100')"
    )
    report = command(sys.executable, "test.py", folder=folder, metric="map50").run(model, scratch)
    assert report.metrics == {"map50": 80.5}


def test_a_stale_metrics_file_does_not_count(model: Path, scratch: Path, folder: Path) -> None:
    (folder / "metrics.txt").write_text("99\n")
    (folder / "metrics.json").write_text('{"map": 99}')
    assert command("echo", "1.5", folder=folder).run(model, scratch).score == 1.5
    error = failure(command("true", folder=folder), model, scratch)
    assert error.code == "QD704"
    for read in ("metrics.txt", "metrics.json"):
        error = failure(command("echo", "1.5", folder=folder, read=read), model, scratch)
        assert error.code == "QD704"
        assert f"no file {read}" in error.got
    assert (folder / "metrics.txt").read_text() == "99\n"


def test_metrics_json_names_several(model: Path, scratch: Path) -> None:
    text = (
        "import json; json.dump({'map': 0.5, 'map50': 0.75, 'worst': float('nan'), 'net': 'x'},"
        "open('metrics.json', 'w')); open('metrics.txt', 'w').write('1')"
    )
    report = python(text, metric="map50", higher_is_better=False).run(model, scratch)
    assert (report.score, report.metric, report.higher_is_better) == (0.75, "map50", False)
    assert set(report.metrics) == {"map", "map50", "worst"}
    assert math.isnan(report.metrics["worst"])
    assert python(text, read="metrics.txt").run(model, scratch).score == 1
    for settings, got in [
        ({}, "several metrics: map, map50, worst"),
        ({"metric": "top1"}, "no metric 'top1' among map, map50, worst"),
        ({"metric": "worst"}, "worst = nan"),
    ]:
        error = failure(python(text, **settings), model, scratch)
        assert (error.code, error.got) == ("QD704", got)


def test_json_in_the_last_line(model: Path, scratch: Path) -> None:
    text = "print('epoch 1'); print('{\"a\": 1, \"b\": 2}')"
    assert python(text, metric="b").run(model, scratch).metrics == {"a": 1, "b": 2}


@pytest.mark.parametrize("text", ["nan", "NaN", "top1: nan", "inf", "-Infinity", '{"a": NaN}'])
def test_not_a_finite_number(model: Path, scratch: Path, text: str) -> None:
    error = failure(command("echo", text), model, scratch)
    assert error.code == "QD704"
    assert "expected a finite number" in str(error)


@pytest.mark.parametrize("text", ["all is well", "accuracy is 75%", "", "[1, 2]", "{", "a: b: c"])
def test_nonsense(model: Path, scratch: Path, text: str) -> None:
    error = failure(command("echo", text), model, scratch)
    assert error.code == "QD704"
    assert text in error.got


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.75", {"score": 0.75}),
        (" 1e-3\n", {"score": 0.001}),
        ("-7", {"score": -7}),
        ("top1: 0.75", {"top1": 0.75}),
        ("top 1 accuracy=0.75", {"top 1 accuracy": 0.75}),
        ("INFO: acc : .5", {"INFO: acc": 0.5}),
        ('{"a": 1, "b": "x", "c": true}', {"a": 1}),
        ("true", {}),
        (": 3", {}),
        ("[" * 100_000, {}),
    ],
)
def test_parsing(text: str, numbers: dict[str, float]) -> None:
    assert parse_numbers(text) == numbers


def test_a_failure_says_the_status_and_the_last_line(model: Path, scratch: Path) -> None:
    text = "import sys; print('7'); sys.exit('first\\nno such label file')"
    error = failure(python(text), model, scratch)
    assert error.code == "QD702"
    assert error.got == "exit status 1; its last line: 'no such label file'"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.run) == (CommandError, str(error), error.run)
    assert error.run.exit_status == 1
    assert 0 < error.run.seconds < 60
    assert error.run.output_tail == "7\nfirst\nno such label file\n"


def test_a_crash_names_the_signal(model: Path, scratch: Path) -> None:
    text = "import os; os.kill(os.getpid(), 11)"
    error = failure(python(text), model, scratch)
    assert (error.got, error.run.exit_status) == ("killed by SIGSEGV, and no output", -11)
    shell = command("kill -9 $$", shell=True)
    assert failure(shell, model, scratch).got == "killed by SIGKILL, and no output"
    assert "SIGKILL" in failure(command("sh", "-c", "exit 137"), model, scratch).got


def test_a_long_log_keeps_its_end(model: Path, scratch: Path) -> None:
    text = (
        "import sys\n"
        "print('o' * 3_000_000 + '\\n0.5'); print('e' * 3_000_000 + 'é', file=sys.stderr)"
    )
    report = python(text).run(model, scratch)
    assert report.score == 0.5
    assert len(report.log) == 4000
    assert "o\n0.5\ne" in report.log
    assert report.log.endswith("eé\n")


@pytest.mark.parametrize("name", ["qdist-no-such-program", "./script.py", "./text", "/"])
def test_what_cannot_be_started(model: Path, scratch: Path, folder: Path, name: str) -> None:
    (folder / "script.py").write_text("#!/no/such/python\nprint(1)")
    (folder / "script.py").chmod(0o755)
    (folder / "text").write_text("not executable")
    error = failure(command(name, "x", folder=folder), model, scratch)
    assert error.code == "QD707"
    assert name in error.got


def test_a_program_that_exits_127_was_started(model: Path, scratch: Path) -> None:
    error = failure(command("sh", "-c", "exit 127"), model, scratch)
    assert (error.code, error.got) == ("QD702", "exit status 127, and no output")


def test_a_program_of_the_folder_is_run_in_the_copy(
    model: Path, scratch: Path, folder: Path
) -> None:
    (folder / "run.sh").write_text("#!/bin/sh\npwd > where; cat where >&2; echo 5")
    (folder / "run.sh").chmod(0o755)
    report = command("./run.sh", folder=folder).run(model, scratch)
    assert report.score == 5
    assert report.log.strip().startswith("5\n" + str(scratch))
    assert not (folder / "where").exists()


def test_a_missing_folder_and_a_missing_model(model: Path, scratch: Path) -> None:
    error = failure(command("true", folder=scratch / "none"), model, scratch)
    assert error.code == "QD707"
    with pytest.raises(ArtifactError) as caught:
        command("true").run(model.with_name("none.onnx"), scratch)
    assert caught.value.code == "QD604"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_users_folder_is_not_touched(model: Path, scratch: Path, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "config.txt").write_text("kept")
    (folder / "own.txt").symlink_to(folder / "sub" / "config.txt")
    (folder / "metrics.txt").write_text("3")
    (folder / "sub").chmod(0o500)
    before = snapshot(folder)
    text = (
        "import os; open('metrics.txt', 'w').write('4'); open('own.txt', 'w').write('through')\n"
        "open('sub/new', 'w').close(); os.remove('sub/config.txt')"
    )
    assert python(text, folder=folder).run(model, scratch).score == 4
    assert snapshot(folder) == before
    assert list(scratch.iterdir()) == []
    (folder / "sub").chmod(0o700)


def test_links_out_of_the_folder_still_lead_there(model: Path, scratch: Path, folder: Path) -> None:
    (folder.parent / "data").mkdir()
    (folder.parent / "data" / "label").write_text("6")
    (folder / "data").symlink_to("../data")
    (folder / "metrics.txt").symlink_to(folder.parent / "data" / "label")
    report = python("print(open('data/label').read())", folder=folder).run(model, scratch)
    assert report.score == 6
    assert (folder.parent / "data" / "label").read_text() == "6"


@pytest.mark.parametrize("inside", [".", "out", "out/scratch"])
def test_scratch_folders_inside_the_users_folder_are_not_copied(
    model: Path, folder: Path, inside: str
) -> None:
    (folder / "script.py").write_text("import os; print(sum(len(f) for _, _, f in os.walk('.')))")
    evaluation = command(sys.executable, "script.py", folder=folder, keep=True)
    scores = [evaluation.run(model, folder / inside).score for _ in range(3)]
    assert scores == [1, 1, 1]


def test_the_scratch_folder_is_kept_on_request(model: Path, scratch: Path) -> None:
    evaluation = python("open('made', 'w').write('x'); print(1)", keep=True)
    evaluation.run(model, scratch)
    evaluation.run(model, scratch)
    assert len(list(scratch.glob("*/work/made"))) == 2


def test_parallel_runs_do_not_collide(model: Path, scratch: Path, folder: Path) -> None:
    (folder / "script.py").write_text("""
import os, sys, time
open("metrics.txt", "w").write(open(sys.argv[1]).read())
time.sleep(0.3)
assert open("metrics.txt").read() == open(sys.argv[1]).read()
""")
    evaluation = command(sys.executable, "script.py", "{model}", folder=folder)
    models = [model.with_name(f"{i}.onnx") for i in range(6)]
    for i, path in enumerate(models):
        path.write_text(str(i))
    with ThreadPoolExecutor(6) as pool:
        reports = list(pool.map(lambda path: evaluation.run(path, scratch), models))
    assert [report.score for report in reports] == list(range(6))
    assert list(scratch.iterdir()) == []


"""Starts a grandchild that ignores SIGTERM, writes both process ids to a file, and hangs."""


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"command": ()}, "QD105"),
        ({"command": ("",)}, "QD105"),
        ({"timeout_s": 0}, "QD104"),
        ({"timeout_s": math.nan}, "QD104"),
        ({"read": "metrics.csv"}, "QD104"),
    ],
)
def test_settings_that_cannot_be_run(settings: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CommandEvaluation(
            **{"command": ("true",), "timeout_s": 1.0, "higher_is_better": True, **settings}
        )
    assert caught.value.code == code


def test_reports_survive_json_and_pickle(model: Path, scratch: Path) -> None:
    evaluation = pickle.loads(pickle.dumps(command("echo", "0.25", environment={"A": "b"})))
    report = evaluation.run(model, scratch)
    assert type(report).from_json(json.loads(json.dumps(report.to_json()))) == report
    assert pickle.loads(pickle.dumps(report)) == report
