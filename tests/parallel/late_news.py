"""A job whose last results reach their keeper when it has nothing left to do: their news must still arrive."""

import sys
import time
from pathlib import Path

from ssx_mpi.parallel import dispatch, launching

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import PlainJob


class LateNews(PlainJob):
    def __init__(self, comm):
        self.comm = comm
        self.heard = []

    def work(self, item, breathe):
        # rank 0 is the slow one, so its results come last
        if self.comm.rank == 0:
            # the keeper gets rid of its news meanwhile, and has nothing left to do when the result comes
            time.sleep(0.02)
            breathe()
            time.sleep(0.05)
            breathe()
            time.sleep(0.02)
        return 0, item

    def keeper(self, item):
        return self.comm.size - 1

    def keep(self, item, result):
        # as long as writing the files of a batch may take
        time.sleep(0.01)
        return result

    def news(self, content):
        self.heard.append(content)


def main(comm):
    assert comm.size == 2
    for _ in range(3):
        job = LateNews(comm)
        dispatch.run(comm, job, [(0, 12)], longest=2)
        if comm.rank == 0:
            assert sorted(job.heard) == list(range(12)), job.heard
    return 0


launching.guarded(main)
