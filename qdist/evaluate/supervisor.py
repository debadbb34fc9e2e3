"""Between us and a user's command: a process that ends everything the command started.

Run by its path, as ``python -I -S supervisor.py PARENT GRACE_S OUTCOME PROGRAM [ARGUMENT ...]``,
so it imports the standard library alone, and little of that. PARENT is the caller's process id,
GRACE_S the seconds between SIGTERM and SIGKILL, and OUTCOME the file that gets "ended CODE"
(negative: minus the signal) or "unstarted REASON". `qdist.evaluate.supervised` starts it, and
says why it is there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_WAITED = {signal.SIGTERM, signal.SIGCHLD}


def main(parent: int, grace_s: float, outcome: str, command: list[str]) -> None:
    """Run ``command`` until it ends or SIGTERM comes, then end what is left. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    _set_prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _set_prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # it died before it could be watched
        os._exit(1)
    child = os.fork()
    if child == 0:
        _become(command, outcome)
    family = _Family(child, outcome)
    while not family.child_ended:
        if signal.sigwaitinfo(_WAITED).si_signo == signal.SIGTERM:
            break
        family.reap()
    family.end(grace_s)
    os._exit(0)


def _set_prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _become(command: list[str], outcome: str) -> None:
    """Turn this process, the child, into the command."""
    _set_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED)
    try:
        os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        _report(outcome, "unstarted " + (getattr(error, "strerror", None) or str(error)))
    os._exit(127)


def _report(outcome: str, text: str) -> None:
    with open(outcome, "w") as file:
        file.write(text)


class _Family:
    """The command and all that it started, orphans included: they become our children."""

    def __init__(self, child: int, outcome: str) -> None:
        self.child_ended = False
        self._child = child
        self._outcome = outcome

    def reap(self) -> bool:
        """Collect those that ended, and report the command's end. True once none is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self._child:
                self.child_ended = True
                if not os.path.exists(self._outcome):
                    _report(self._outcome, f"ended {os.waitstatus_to_exitcode(status)}")

    def end(self, grace_s: float) -> None:
        """SIGTERM to the group and, when the grace is over, SIGKILL to every descendant."""
        if self.reap():
            return
        os.killpg(0, signal.SIGTERM)  # blocked here
        deadline = time.monotonic() + grace_s
        while not self.reap() and time.monotonic() < deadline:
            time.sleep(0.01)
        while not self.reap():
            for pid in _children():
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def _children() -> list[int]:
    pid = os.getpid()
    try:
        with open(f"/proc/self/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:  # no such list here: the group, this process included
        os.killpg(0, signal.SIGKILL)
        raise


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:])
