"""Evaluation commands, run as real processes: what they say, how they fail, how they end."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qdist.errors import ArtifactError, ConfigError, EvaluationError
from qdist.evaluate.command import CommandError, CommandEvaluation
from qdist.evaluate.result import parse_numbers


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


def command(*argv: str, **settings: Any) -> CommandEvaluation:
    return CommandEvaluation(
        command=argv, **{"timeout_s": 60.0, "higher_is_better": True, **settings}
    )


def python(text: str, *arguments: str, **settings: Any) -> CommandEvaluation:
    return command(sys.executable, "-c", text, *arguments, **settings)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def failure(evaluation: CommandEvaluation, model: Path, scratch: Path) -> CommandError:
    with pytest.raises(CommandError) as caught:
        evaluation.run(model, scratch)
    assert list(scratch.iterdir()) == [], "the scratch folder was left"
    assert isinstance(caught.value, EvaluationError)
    return caught.value


def test_the_last_line_of_stdout_is_the_metric(model: Path, scratch: Path) -> None:
    text = "import sys; print('loading'); print('top1: 0.75\\n'); print('warned', file=sys.stderr)"
    report = python(text).run(model, scratch)
    assert (report.score, report.metric, report.metrics) == (0.75, "top1", {"top1": 0.75})
    assert report.mode == "artifact-exact"
    assert report.n_samples is None
    assert 0 < report.seconds < 60
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
    assert (type(again), str(again), again.log) == (CommandError, str(error), error.log)
    assert error.log == "7\nfirst\nno such label file\n"


def test_a_crash_names_the_signal(model: Path, scratch: Path) -> None:
    text = "import os; os.kill(os.getpid(), 11)"
    assert failure(python(text), model, scratch).got == "killed by SIGSEGV, and no output"
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


HANG = """
import os, signal, subprocess, sys, time
grandchild = subprocess.Popen(
    [sys.executable, "-c", "import signal, time\\n"
     "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nprint('ready', flush=True)\\n"
     "time.sleep(300)"],
    stdout=subprocess.PIPE, start_new_session="session" in sys.argv)
grandchild.stdout.readline()
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {grandchild.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
print("started", flush=True)
if "leave" in sys.argv:
    print(1)
else:
    time.sleep(300)
"""
"""Starts a grandchild that ignores SIGTERM, writes both process ids to a file, and hangs."""


@pytest.mark.parametrize("how", [[], ["deaf"], ["session"]])
def test_time_runs_out_and_the_grandchild_goes_too(
    model: Path, scratch: Path, tmp_path: Path, how: list[str]
) -> None:
    pids = tmp_path / "pids"
    started = time.monotonic()
    error = failure(python(HANG, str(pids), *how, timeout_s=1.0), model, scratch)
    assert time.monotonic() - started < 8
    assert error.code == "QD703"
    assert error.got == "no end after 1 s"
    assert error.log == "started\n"
    assert [is_alive(int(pid)) for pid in pids.read_text().split()] == [False, False]


def test_what_a_command_leaves_behind_is_ended(model: Path, scratch: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    assert python(HANG, str(pids), "leave").run(model, scratch).score == 1
    assert [is_alive(int(pid)) for pid in pids.read_text().split()] == [False, False]
    # In time, though what it left takes longer than that to end.
    assert python(HANG, str(pids), "leave", timeout_s=1.5).run(model, scratch).score == 1


def test_sigterm_comes_first(model: Path, scratch: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    text = f"""
import signal, sys, time
def end(*_):
    open({str(said)!r}, "w").write("goodbye")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
time.sleep(300)
"""
    started = time.monotonic()
    assert failure(python(text, timeout_s=1.0), model, scratch).code == "QD703"
    assert said.read_text() == "goodbye"
    assert time.monotonic() - started < 2.9


def test_ctrl_c_ends_the_command(model: Path, scratch: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def interrupt() -> None:
        eventually(pids.exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        python(HANG, str(pids)).run(model, scratch)
    thread.join()
    assert [is_alive(int(pid)) for pid in pids.read_text().split()] == [False, False]
    assert list(scratch.iterdir()) == []


PARENT = """
import sys, threading
from pathlib import Path
from qdist.evaluate.command import CommandEvaluation
evaluation = CommandEvaluation(
    command=(sys.executable, "-c", sys.argv[3], sys.argv[4], *sys.argv[5:]), timeout_s=300,
    higher_is_better=True)
run = lambda: evaluation.run(Path(sys.argv[1]), Path(sys.argv[2]))
thread = threading.Thread(target=run)  # as Ray's actors may call it
thread.start()
thread.join()
"""


@pytest.mark.parametrize("how", [[], ["deaf"], ["session"]])
def test_a_killed_parent_leaves_no_command(
    model: Path, scratch: Path, tmp_path: Path, how: list[str]
) -> None:
    pids = tmp_path / "pids"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model), str(scratch), HANG, str(pids), *how],
        cwd=Path(__file__).parents[2],
    )
    assert eventually(pids.exists, 60)
    child, grandchild = (int(pid) for pid in pids.read_text().split())
    assert is_alive(child)
    assert is_alive(grandchild)
    parent.kill()
    parent.wait()
    assert eventually(lambda: not is_alive(child) and not is_alive(grandchild))


def test_a_killed_supervisor_leaves_no_command(model: Path, scratch: Path, tmp_path: Path) -> None:
    # As by the kernel when memory runs out.
    pids = tmp_path / "pids"
    text = HANG.replace("time.sleep(300)\n", "os.kill(os.getppid(), 9); time.sleep(300)\n")
    assert "getppid" in text
    error = failure(python(text, str(pids)), model, scratch)
    assert (error.code, "supervisor was killed" in error.got) == ("QD702", True)
    for pid in pids.read_text().split():
        assert eventually(lambda pid=int(pid): not is_alive(pid))  # type: ignore[misc]


def test_a_supervisor_that_hangs_is_killed(model: Path, scratch: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    text = HANG.replace("time.sleep(300)\n", f"os.kill(os.getppid(), {signal.SIGSTOP:d})\n")
    error = failure(python(text + "time.sleep(300)", str(pids), timeout_s=1.0), model, scratch)
    assert error.code == "QD703"
    for pid in pids.read_text().split():
        assert eventually(lambda pid=int(pid): not is_alive(pid))  # type: ignore[misc]


def test_a_killed_supervisor_takes_the_command_with_it(
    model: Path, scratch: Path, tmp_path: Path
) -> None:
    # While its parent can do nothing about it.
    pids = tmp_path / "pids"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model), str(scratch), HANG, str(pids)],
        cwd=Path(__file__).parents[2],
    )
    assert eventually(pids.exists, 60)
    child, _ = (int(pid) for pid in pids.read_text().split())
    group = os.getpgid(child)
    parent.send_signal(signal.SIGSTOP)
    os.kill(group, signal.SIGKILL)
    try:
        assert eventually(lambda: not is_alive(child))
    finally:
        parent.kill()
        parent.wait()
        os.killpg(group, signal.SIGKILL)


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
