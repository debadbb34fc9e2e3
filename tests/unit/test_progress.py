"""Progress: live bars on a terminal, plain lines with a rate elsewhere."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from qdist.cli.progress import Bar, bar


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=200), out


def test_elsewhere_a_line_comes_every_five_seconds_with_the_rate_of_this_run(clock: Clock) -> None:
    console, out = plain()
    drawing = Bar(console, "calibrating", "samples")
    drawing.update(40, 100)  # an earlier run's
    for done in range(41, 61):
        clock.now += 1
        drawing.update(done, 100, "2 workers")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == "calibrating: 45/100 samples, 1.0 samples/s, about 55 s left, 2 workers"
    assert lines[-1].startswith("calibrating: 60/100 samples, 1.0 samples/s, about 40 s left")
    clock.now += 40
    drawing.update(100, 100)
    assert len(out.getvalue().splitlines()) == 4, "the last line is close()'s"
    drawing.close(100, 100)
    assert out.getvalue().splitlines()[-1] == "calibrating: 100/100 samples, 1.0 samples/s"


def test_the_clock_can_be_started_again_when_the_work_begins(clock: Clock) -> None:
    console, out = plain()
    drawing = Bar(console, "calibrating", "samples")
    drawing.update(0, 100, "starting workers")
    clock.now += 60
    drawing.start_clock()
    clock.now += 10
    drawing.update(0, 100)
    clock.now += 10
    drawing.update(50, 100)
    assert "50/100 samples, 2.5 samples/s, about 20 s left" in out.getvalue()


def test_nothing_is_said_of_a_rate_when_nothing_was_done(clock: Clock) -> None:
    console, out = plain()
    with bar(console, "calibrating", "samples") as drawing:
        drawing.update(160, 160)
        clock.now += 2
        drawing.close(160, 160)
    assert out.getvalue() == "calibrating: 160/160 samples, all of it done before\n"


def test_lines_of_their_own_are_printed_as_they_are() -> None:
    console, out = plain()
    with bar(console, "searching", "trials") as drawing:
        drawing.say("trial 3 [red] goes to another worker :smile:")
    assert out.getvalue() == "trial 3 [red] goes to another worker :smile:\n"


def test_on_a_terminal_a_bar_is_drawn_and_stops_however_the_block_ends() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)

    def interrupted() -> None:
        with bar(console, "calibrating", "samples") as drawing:
            drawing.update(10, 100, "2 workers")
            drawing.say("worker calibration-1 is gone")
            drawing.start_clock()
            drawing.update(30, 100, "1 worker")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = out.getvalue()
    assert "calibrating" in text
    assert "30/100" in text
    assert "1 worker" in text
    assert "worker calibration-1 is gone" in text
    assert text.endswith("\x1b[?25h"), "the cursor is visible again"
