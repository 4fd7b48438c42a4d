"""The program ssx_mpi.reduce, the second of whose ranks is asked to stop when the first sums of merging are made."""

import os
import signal
import sys

from ssx_mpi import dials_compat

dials_compat.prepare()

from ssx_mpi.command_line import reduce  # noqa: E402
from ssx_mpi.reduction import procedure  # noqa: E402

merge = procedure.merge


def merge_and_signal(*arguments, **more):
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return merge(*arguments, **more)


procedure.merge = merge_and_signal
reduce.run(sys.argv[2:])
