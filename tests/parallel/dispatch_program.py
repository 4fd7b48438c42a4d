"""The dispatch with a job that only counts: dispatch_program.py N_ITEMS WANTED STOP_AT GROUP; rank 0 prints JSON."""

import json
import sys

from ssx_mpi.parallel import dispatch, launching, message_loop, schedule
from ssx_mpi.parallel.communicator import Communicator


class Counting:
    """Item i is worth i % 3; each hundred has a keeper that tells rank 0 when it has all of them."""

    def __init__(self, comm: Communicator, n_items: int, stop_at: int) -> None:
        self.comm, self.n_items, self.stop_at = comm, n_items, stop_at
        self.kept: dict[int, int] = {}
        self.heard: list[int] = []
        self.worked = self.noted = self.done = 0

    def work(self, item, breathe):
        self.worked += 1
        breathe()
        return item % 3, item * item

    def note(self, value):
        self.noted += 1
        return value

    def keeper(self, item):
        return item // 100 % self.comm.size

    def keep(self, item, result):
        assert item not in self.kept
        self.kept[item] = result
        hundred = range(item // 100 * 100, min(item // 100 * 100 + 100, self.n_items))
        return item // 100 if all(i in self.kept for i in hundred) else None

    def news(self, content):
        self.heard.append(content)

    def progress(self, done):
        self.done = done

    def stopping(self):
        return 0 < self.stop_at <= self.worked

    def waiting(self):
        return None

    def silent(self, rank, seconds):
        raise AssertionError("no rank is silent")


def main(comm: Communicator) -> int:
    n_items, wanted, stop_at, group = (int(a) for a in sys.argv[1:])
    if group:
        schedule.RANKS_PER_COORDINATOR, schedule.DEDICATED_FROM, schedule._STRETCH, message_loop._TELL = (
            group,
            3,
            10,
            0.01,
        )
    job = Counting(comm, n_items, stop_at if comm.rank == comm.size - 1 else 0)
    half = n_items // 2
    end, stopped, _ = dispatch.run(comm, job, [(half, n_items), (0, half)], wanted=wanted or None, longest=8)
    kept = comm.gather(job.kept)
    worked = comm.gather(job.worked)
    if kept is not None:
        items = sorted(item for part in kept for item in part)
        right = all(part[i] == i * i for part in kept for i in part)
        print(
            json.dumps(
                {
                    "size": comm.size,
                    "items": items,
                    "right": right,
                    "heard": sorted(job.heard),
                    "noted": job.noted,
                    "worked": worked,
                    "end": end,
                    "stopped": stopped,
                }
            )
        )
    return 0


launching.guarded(main)
