"""User commands and the processes they start: whatever happens, none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.user_commands import failure, python


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a model.onnx"
    path.write_bytes(b"the artifact")
    return path


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


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
    assert error.run.output_tail == "started\n"
    assert error.run.exit_status is None
    assert 1.0 <= error.run.seconds < 8
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
