"""Exit codes of the programs."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a program ends with; batch systems and scripts act on these numbers."""

    #: done, with something to show for it
    DONE = 0
    #: a fault in the program, or files that cannot be written
    FAULT = 1
    #: bad input or parameters
    REFUSED = 2
    #: done, but no crystal came out
    NOTHING_FOUND = 3
    #: stopped early because too many images fail in the same way
    TOO_MANY_FAILURES = 4
    #: stopped on request or ahead of the time limit, with work left
    STOPPED = 75
    #: ended by a second interrupt from the keyboard
    INTERRUPTED = 130
