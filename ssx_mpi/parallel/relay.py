"""Stands between a user and mpiexec: a request to stop goes to the ranks, which mpiexec itself would kill or not tell.

Launchers differ in which signals they pass on, and they answer SIGTERM by ending the ranks within a second. So the
ranks are asked directly; they finish what they have in hand, and mpiexec returns their exit code. One rank that is
asked tells the others, so those on other nodes need not be asked.

Started as ``ssx_mpi.launch mpiexec ...``, and by the programs themselves; imports nothing that is large.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# of the terminal; ranks hear SIGTERM instead
_OF_TERMINAL = (signal.SIGINT, signal.SIGHUP)
# what a program ends with after a second interrupt from the keyboard, as in exit_codes.py
_INTERRUPTED = 130
# what a launcher that handles it passes on, looked for in this order: Open MPI handles SIGUSR1 too, and keeps it to
# itself; Hydra (MPICH) handles SIGUSR1 alone
_PASSED_ON = (signal.SIGUSR2, signal.SIGUSR1)
# seconds after which ranks are taken to be on other nodes alone, when there are none on this one; those of srun are not
# its own processes anywhere
_ELSEWHERE = 5
#: option of mpiexec of Open MPI up to 4: it says nothing of its own, not even why it cannot start the ranks
QUIET = "-q"


def descendants(process: int) -> list[int]:
    """Processes of this machine that `process` has started, directly or not."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the name of the program, in brackets, may hold anything
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found, new = [], [process]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def is_rank(process: int) -> bool:
    """Whether `process` is one of our programs: ``python -m ssx_mpi``, or a script of such a name."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    program = words[2] if words[1:2] == [b"-m"] else words[1] if len(words) > 1 else b""
    return program.rpartition(b"/")[2].startswith(b"ssx_mpi")


def listens(process: int, number: int) -> bool:
    """Whether `process` handles signal `number`, or will when it has come up; others would die of it."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk", "SigCgt"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


class Relay:
    """Passes requests to stop on to the ranks that `launcher` starts; again every second while there is none to ask."""

    def __init__(self, launcher: int, elsewhere: bool) -> None:
        self._launcher = launcher
        self._most_tries = 0 if elsewhere else _ELSEWHERE
        self._number = signal.SIGTERM
        self._tries = 0
        #: whether an interrupt came from the keyboard, and another one
        self.interrupted = self.killed = False
        for number in _REQUESTS:
            signal.signal(number, self._ask)
        for number in _OF_TERMINAL:
            # nohup, or a job in the background
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._leave)
        signal.signal(signal.SIGALRM, self._ask)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.interrupted:
            self.killed = True
            for process in [*descendants(self._launcher), self._launcher]:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            return
        self.interrupted |= number == signal.SIGINT
        self._ask(signal.SIGTERM, frame)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            self._number, self._tries = signal.Signals(number), 0
        self._tries += 1
        ranks = [process for process in descendants(self._launcher) if is_rank(process)]
        listening = [process for process in ranks if listens(process, self._number)]
        number = self._number
        passed_on = [number for number in _PASSED_ON if listens(self._launcher, number)]
        if not ranks and self._tries > self._most_tries and passed_on:
            listening, number = [self._launcher], passed_on[0]
        for process in listening:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                pass
        signal.alarm(0 if listening else 1)


def main(command: list[str]) -> int:
    """Run `command` and pass requests to stop on to the ranks that it starts; returns its exit code."""
    # what comes from here on waits until there is someone to hear it
    waiting = (*_REQUESTS, *_OF_TERMINAL)
    signal.pthread_sigmask(signal.SIG_BLOCK, waiting)

    def begin() -> None:
        # in a group of its own: an interrupt from the keyboard would have the launcher kill the ranks
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)

    try:
        launcher = subprocess.Popen(
            command,
            preexec_fn=begin,
            stdin=subprocess.DEVNULL if sys.stdin is not None and sys.stdin.isatty() else None,
        )
    except OSError as error:
        print(f"ssx_mpi: {command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 2
    relay = Relay(launcher.pid, elsewhere=command[0].rpartition("/")[2] == "srun")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)
    # only our own start is quiet, and has its ranks on this machine
    had_ranks = not {QUIET, sys.executable} <= set(command)
    while not had_ranks and launcher.poll() is None:
        had_ranks = any(map(is_rank, descendants(launcher.pid)))
        time.sleep(0.1)
    status = launcher.wait()
    signal.alarm(0)
    status = _INTERRUPTED if relay.killed else status if status >= 0 else 128 - status
    if status and not had_ranks:
        trial = shlex.join([*(word for word in command[: command.index(sys.executable)] if word != QUIET), "true"])
        why = f"{command[0]} ended with {status} and started nothing; this tells why: {trial}"
        print(f"ssx_mpi: {why}", file=sys.stderr)
    elif status > 128:
        print(f"ssx_mpi: ended by signal {status - 128}; the same command goes on", file=sys.stderr)
    return status


if __name__ == "__main__":
    # the programs put this in their own place when they start ranks
    sys.exit(main(sys.argv[1:]))
