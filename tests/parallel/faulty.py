"""The program with a fault in its work on one image: ``python faulty.py FAULT:IMAGE arguments``, image from zero."""

import ctypes
import dataclasses
import os
import signal
import sys
import time

from ssx_mpi.command_line import process


def segfault():
    ctypes.string_at(8)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def slow():
    time.sleep(1000)


def hang():
    # below Python, with its lock held, as a library does: a mutex that is never let go
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def silent():
    # comes back, after nothing was heard of it for long
    time.sleep(10)


def error():
    raise TypeError("a fault in the program")


def unreadable(imageset):
    raise RuntimeError("cannot be read")


def main() -> None:
    from ssx_mpi import dials_compat

    dials_compat.prepare()
    from ssx_mpi.parallel import heartbeat
    from ssx_mpi.processing import failures, watch
    from ssx_mpi.stages.stills import StillProcessor

    # there are few images
    failures._FEWEST_TO_JUDGE = 5
    # and little time
    heartbeat.BEAT, heartbeat.SILENT, watch.GRACE = 0.5, 2.5, 3.0

    fault, _, place = sys.argv[1].partition(":")
    sound = StillProcessor.find_spots
    faulty_rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == place

    def find_spots(self, image):
        if fault == "unreadable":
            self._engine = dataclasses.replace(self._engine, read=unreadable)
        elif fault.startswith("rank_"):
            # on the first image of a rank, whichever that is
            nonlocal faulty_rank
            if faulty_rank:
                faulty_rank = False
                globals()[fault.removeprefix("rank_")]()
        elif image == int(place):
            globals()[fault]()
        return sound(self, image)

    StillProcessor.find_spots = find_spots
    process.run(sys.argv[2:])


main()
