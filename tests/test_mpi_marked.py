"""Tests that run inside an MPI job, marked for pytest-mpi, and the ordinary one that starts them on several ranks."""

from __future__ import annotations

import numpy as np
import pytest
from support import TESTS, PlainJob, run_mpi

from ssx_mpi.parallel import dispatch
from ssx_mpi.parallel.communicator import MpiCommunicator
from ssx_mpi.processing.resume import BatchKeeping, survey
from ssx_mpi.records.batch_files import batches


@pytest.mark.parametrize("n", [1, 3])
def test_marked_tests_pass_on_ranks(n):
    done = run_mpi(n, [TESTS / "mpi_pytest.py", "--with-mpi", "-m", "mpi", __file__], timeout=150)
    assert done.status == 0, done.text
    # those for two ranks or more are skipped on one
    assert f"{'3 passed' if n > 1 else '1 passed, 2 skipped'}" in done.out


def test_a_failure_on_one_rank_ends_the_job(tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text(
        "from mpi4py import MPI\n"
        "def test_one_rank_is_wrong():\n"
        "    assert MPI.COMM_WORLD.rank != 1\n"
        "    MPI.COMM_WORLD.Barrier()\n"
    )
    done = run_mpi(3, [TESTS / "mpi_pytest.py", str(failing)], timeout=90)
    assert done.status == 1
    assert "failed on rank 1 of 3" in done.err


@pytest.fixture
def comm() -> MpiCommunicator:
    from mpi4py import MPI

    return MpiCommunicator(MPI.COMM_WORLD)


@pytest.mark.mpi
def test_ranks_are_numbered_and_connected(comm):
    assert comm.allgather(comm.rank) == list(range(comm.size))
    assert comm.sum(np.ones(2)).tolist() == [comm.size] * 2


class Slow(PlainJob):
    """Ten items whose results all go to the last rank, which is the slowest."""

    def __init__(self, comm):
        self.comm, self.kept = comm, {}
        self.stopping = lambda: False

    def work(self, item, breathe):
        breathe()
        return 1, np.full(200_000, float(item))

    def keeper(self, item):
        return self.comm.size - 1

    def keep(self, item, result):
        assert (result == item).all()
        self.kept[item] = len(result)
        return item

    def news(self, content):
        assert self.comm.rank == 0

    def progress(self, done):
        """Nobody looks."""


@pytest.mark.mpi(min_size=2)
def test_large_results_reach_their_keeper(comm):
    job = Slow(comm)
    end, stopped, traffic = dispatch.run(comm, job, [(0, 60)])
    assert (end, stopped) == (60, False)
    assert len(job.kept) == (60 if comm.rank == comm.size - 1 else 0)
    everyone = comm.allgather(traffic)
    assert sum(t.items for t in everyone) == 60
    # and nothing is left over for the next job
    assert dispatch.run(comm, Slow(comm), [(0, 3)])[0] == 3


@pytest.mark.mpi(min_size=2)
def test_every_batch_has_one_keeper_and_all_ranks_know_what_is_pending(comm, mpi_tmpdir):
    from pathlib import Path

    folder = Path(str(mpi_tmpdir))
    keeping = BatchKeeping(batches(folder, 50, 8), 8, {"run": "x"}, {}, True, comm.size)
    found = survey(comm, keeping, ("find_spots",))
    assert found.pending == [(first, min(first + 8, 50)) for first in range(0, 50, 8)]
    assert comm.allgather(found.pending) == [found.pending] * comm.size
    keepers = [keeping.keeper(b.number) for b in keeping.batches]
    assert set(keepers) == set(range(comm.size))
    assert keepers[0] == comm.size - 1
