"""The watch of a rank: requests to stop, the time limit of the job, and that of an image.

Three things can go on for too long, and each has two guards. An alarm signal interrupts Python; where a library hangs
below Python, which no signal handler of Python can interrupt, a thread of the interpreter ends the process a little
later and leaves the stack behind, so that the next run knows the image.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.records import in_hand
from ssx_mpi.records.files import DamagedFileError

logger = logging.getLogger("ssx_mpi")

T = TypeVar("T")

# what asks for an orderly end; the last two come from the terminal, and are left alone where whoever started us ignores
# them (nohup, a job in the background)
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_OF_TERMINAL = (signal.SIGINT, signal.SIGHUP)
#: seconds that images in hand have after a request to stop
GRACE = 30.0
# the run stops so many seconds before its time limit, or a fifth of the time where that is less: the images in hand
# and the files of the batches need it
_MARGIN = 60.0
# an alarm that a library swallowed comes again after so many seconds
_AGAIN = 5.0
# the thread that ends the process is started anew no more often than this, in seconds: that costs 0.1 ms
_REARM = 5.0
# the system's timers do not go on for longer, in seconds
_FOR_EVER = 1e8


class ImageAbandoned(BaseException):
    """Raised within the work on an image that has taken too long; no library catches it."""


class Watch:
    """Watches over one rank; see :meth:`open` for what needs the folder of the run.

    Parameters
    ----------
    time_limit : float, optional
        Seconds that the run may take from now on; None for what is left of the Slurm job.
    image_timeout : float
        Seconds that an image may take.
    """

    def __init__(self, time_limit: float | None, image_timeout: float) -> None:
        self._image_timeout = image_timeout
        # by the monotonic clock, as all times here
        self._deadline = time.monotonic() + _seconds_left(time_limit)
        self._asked: float | None = None
        #: why the job is to stop, for the log
        self.reason = ""
        self._image: int | None = None
        self._image_began = 0.0
        self._breathing = False
        self._overdue = False
        self._guarded_since: float | None = None
        self._in_hand: in_hand.InHand | None = None
        self._directory = Path()
        self._places: list[tuple[str, int]] = []
        self._abort: Callable[[int], None] = sys.exit
        #: images that are not tried, and why
        self.set_aside: dict[int, str] = {}
        #: images that may have ended an earlier run
        self.suspects: set[int] = set()
        for number in _REQUESTS:
            if number not in _OF_TERMINAL or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note_request)
        signal.signal(signal.SIGALRM, self._alarm)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _REQUESTS)

    def open(self, comm: Communicator, directory: Path) -> None:
        """Learn what earlier runs in `directory` died of, and begin to note what is in hand; collective."""
        found = _take_over(directory) if comm.rank == 0 else None
        self.set_aside, self.suspects = comm.bcast(found)
        hosts = comm.allgather(node_name())
        seen: dict[str, int] = {}
        for host in hosts:
            self._places.append((host, seen.get(host, 0)))
            seen[host] = self._places[-1][1] + 1
        self._directory = directory
        self._abort = comm.abort
        self._in_hand = in_hand.InHand(directory, *self._places[comm.rank], comm.rank)
        faulthandler.enable(self._in_hand.descriptor, all_threads=False)

    def close(self, comm: Communicator) -> None:
        """The run ends in order; collective."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        if self._in_hand is None:
            return
        self._in_hand.clear()
        faulthandler.disable()
        self._in_hand.close()
        self._in_hand = None
        comm.barrier()
        if comm.rank == 0:
            in_hand.remove(self._directory)

    def ask(self, reason: str) -> None:
        """Have the job stop: images in hand are finished, no others begun."""
        if not self.stopping():
            self._asked = time.monotonic()
            self.reason = reason

    def stopping(self) -> bool:
        """Whether the job is to stop, on request or because its time is over."""
        if self._asked is None and time.monotonic() >= self._deadline:
            self._asked = self._deadline
            self.reason = "ahead of the time limit"
        return self._asked is not None

    def image(self, image: int, work: Callable[[], T]) -> T:
        """Do `work` on `image`.

        Raises
        ------
        ImageAbandoned
            When it takes longer than an image may; :meth:`stopping` is true when the reason is a request to stop.
        """
        self._begin(image)
        try:
            done = work()
        except (ImageAbandoned, DamagedFileError):
            # a file of the run that is damaged is not the fault of the image
            self._end()
            raise
        except Exception as error:
            # the note stays: it tells the next run what this one died of
            if self._image is not None and self._in_hand is not None:
                self._in_hand.last_words(f"{type(error).__name__}: {error}\n")
            self._image = None
            raise
        self._end()
        return done

    def breathing(self, breathe: Callable[[], None]) -> None:
        """Call `breathe` undisturbed: an alarm that falls into it is raised afterwards."""
        self._breathing = True
        try:
            breathe()
        except Exception:
            # what fails here is not the fault of the image
            self._end()
            raise
        finally:
            self._breathing = False
        if self._overdue:
            self._overdue = False
            raise ImageAbandoned

    def waiting(self) -> None:
        """This rank waits for others: nothing of its own can take too long."""
        if self._guarded_since is not None:
            faulthandler.cancel_dump_traceback_later()
            self._guarded_since = None

    def together(self, comm: Communicator) -> None:
        """From here on all ranks work together, on no image: that may take long, but not after a request to stop."""
        self.waiting()
        self._abort = comm.abort
        self._set_alarm()

    def whereabouts(self, rank: int) -> tuple[str, int | None, float | None]:
        """Host of `rank`, the image that it has in hand and for how many seconds, as far as can be seen from here."""
        if rank >= len(self._places):
            return "", None, None
        host, slot = self._places[rank]
        note = in_hand.read_slot(self._directory, host, slot)
        return (host, note.image, time.time() - note.began) if note else (host, None, None)

    def _begin(self, image: int) -> None:
        self._image, self._image_began, self._overdue = image, time.monotonic(), False
        if self._in_hand is not None:
            self._in_hand.note(image, time.time())
            if self._asked is not None:
                self._in_hand.asked()
            if self._guarded_since is None or self._image_began - self._guarded_since > _REARM:
                self._guarded_since = self._image_began
                # beyond what the alarm would have done, by the time for which this may not be renewed
                seconds = 1.2 * self._image_timeout + 2 * _REARM
                faulthandler.dump_traceback_later(seconds, exit=True, file=self._in_hand.descriptor)
        self._set_alarm()

    def _end(self) -> None:
        # first: an alarm from here on finds no image
        self._image = None
        self._set_alarm()
        if self._in_hand is not None:
            self._in_hand.clear()

    def _note_request(self, number: int, frame) -> None:
        if number == signal.SIGINT and self._asked is not None:
            # pressed again: whoever sits there does not want to wait
            self._abort(ExitCode.INTERRUPTED)
        if self._in_hand is not None:
            self._in_hand.asked()
        if self._asked is None:
            self._asked = time.monotonic()
            self.reason = f"on request ({signal.Signals(number).name})"
            self._set_alarm()

    def _end_of_patience(self) -> float:
        """When what is at work now will have taken too long."""
        stop = self._deadline if self._asked is None else self._asked
        if self._image is None:
            # later, so that a rank with an image in hand comes first
            return stop + 1.5 * GRACE
        return min(self._image_began + self._image_timeout, stop + GRACE)

    def _set_alarm(self) -> None:
        seconds = self._end_of_patience() - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3) if seconds < _FOR_EVER else 0.0, _AGAIN)

    def _alarm(self, number: int, frame) -> None:
        if time.monotonic() < self._end_of_patience():
            return
        if self._image is None:
            # not in an image, so in something that cannot be cut short; what is finished is on the disk
            sys.stderr.write(f"ssx_mpi: not stopped in order within {GRACE:.0f} s of the request; stopping now\n")
            self._abort(ExitCode.STOPPED)
        elif self._breathing:
            self._overdue = True
        else:
            raise ImageAbandoned


@contextmanager
def holding_requests() -> Iterator[None]:
    """Requests to stop wait until there is a :class:`Watch` that listens: the start may take long on a busy system."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def node_name() -> str:
    """Name of this node; Slurm's, where there is one."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def _seconds_left(time_limit: float | None) -> float:
    """Seconds from now until the run should begin to stop."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if time_limit is None and end.isdigit():
        time_limit = int(end) - time.time()
    if time_limit is None:
        return float("inf")
    return time_limit - min(_MARGIN, time_limit / 5)


def _take_over(directory: Path) -> tuple[dict[int, str], set[int]]:
    """Images to set aside, and those to try once more, from what earlier runs left; rank 0."""
    strikes = in_hand.Strikes(directory)
    if strikes.damage:
        logger.warning("%s", strikes.damage)
    strikes.add(in_hand.strikes_of(in_hand.left_behind(directory)))
    in_hand.remove(directory)
    set_aside = strikes.set_aside
    return set_aside, set(strikes.of_image) - set(set_aside)
