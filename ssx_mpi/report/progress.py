"""A progress bar on a terminal, plain lines in the log of a batch job."""

from __future__ import annotations

import logging
import os
import sys
import time

from ssx_mpi.report.text import duration

logger = logging.getLogger("ssx_mpi")

# in a batch job a line this often, in seconds, tells that the job is alive
_LINE_EVERY = 60.0


#: environment variable with the columns of the terminal that an mpiexec of ours writes to
TERMINAL = "SSX_MPI_TERMINAL_COLUMNS"


def terminal_columns() -> int | None:
    """Columns of the terminal that the standard error ends on; None where it can be asked, 0 where there is none."""
    if sys.stderr.isatty():
        return None
    given = os.environ.get(TERMINAL, "")
    return int(given) if given.isdigit() else 0


class Progress:
    """How far a stage is.

    Parameters
    ----------
    title
        What is being done.
    total
        Number of images.
    shown
        Whether this rank shows anything.
    """

    def __init__(self, title: str, total: int, shown: bool) -> None:
        self._title = title
        self._total = total
        self._began = self._last_line = time.monotonic()
        self._offset = 0
        self._bar = None
        self._shown = shown
        columns = terminal_columns()
        if shown and columns != 0:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit="img", ncols=columns, dynamic_ncols=columns is None)

    def start(self, done: int) -> None:
        """Say that `done` images were finished before."""
        self._offset = done
        self.show(0)

    def show(self, done: int) -> None:
        """Show that `done` images are finished since the start."""
        if not self._shown:
            return
        done += self._offset
        if self._bar is not None:
            if done != self._bar.n:
                self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            logger.info("%s: %d of %d images after %s", self._title, done, self._total, duration(now - self._began))

    def note(self, words: str) -> None:
        """Add `words` to the bar, such as the share of hits."""
        if self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
