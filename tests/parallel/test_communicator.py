"""Communicators: one process alone and MPI ranks answer alike."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support import run_mpi

from ssx_mpi.parallel.collective import on_root
from ssx_mpi.parallel.communicator import SerialCommunicator

CHECKS = """
import numpy as np
from mpi4py import MPI
from ssx_mpi.parallel.collective import on_root
from ssx_mpi.parallel.communicator import MpiCommunicator

comm = MpiCommunicator(MPI.COMM_WORLD)
n, r = comm.size, comm.rank
assert comm.bcast({"of": r}) == {"of": 0}
assert comm.bcast(r, root=n - 1) == n - 1
assert comm.gather(r * r) == ([k * k for k in range(n)] if r == 0 else None)
assert comm.allgather("abc"[:r]) == ["abc"[:k] for k in range(n)]
assert comm.alltoall([(r, k) for k in range(n)]) == [(k, r) for k in range(n)]
values = np.arange(6, dtype=np.int64).reshape(2, 3) * (r + 1)
total, most = comm.sum(values), comm.max(values)
# an array without dimensions stays one: newer NumPy makes a number of nothing else
assert comm.sum(np.array(2.0)).shape == comm.max(np.array(2.0)).shape == () and float(comm.sum(np.array(2.0))) == 2 * n
assert total.dtype == values.dtype and (total == np.arange(6).reshape(2, 3) * n * (n + 1) // 2).all()
assert (most == np.arange(6).reshape(2, 3) * n).all()
# every second column: not contiguous
assert (comm.sum(values[:, ::2]) == np.arange(6).reshape(2, 3)[:, ::2] * n * (n + 1) // 2).all()

def refuse():
    raise LookupError("not here")

calls = []
assert on_root(comm, lambda: calls.append(r) or "found", LookupError) == "found"
assert calls == ([0] if r == 0 else [])
try:
    on_root(comm, refuse, LookupError)
except LookupError as error:
    assert str(error) == "not here"
else:
    raise AssertionError("no error")
comm.barrier()
print(f"rank {r} is through")
"""


@pytest.mark.parametrize("n", [1, 3])
def test_mpi_communicator(n, tmp_path):
    script = tmp_path / "checks.py"
    script.write_text(CHECKS)
    done = run_mpi(n, [script], timeout=60)
    assert done.status == 0, done.text
    # lines of different ranks may run into each other
    assert sorted(re.findall(r"rank (\d) is through", done.out)) == [str(r) for r in range(n)]


def test_one_process_alone():
    comm = SerialCommunicator()
    values = np.array([[1.5, -2.0]])
    assert (comm.rank, comm.size) == (0, 1)
    assert comm.bcast("x") == "x"
    assert comm.gather(3) == comm.allgather(3) == comm.alltoall([3]) == [3]
    for combined in (comm.sum(values), comm.max(values)):
        assert combined is not values
        assert np.array_equal(combined, values)
    with pytest.raises(SystemExit) as left:
        comm.abort(4)
    assert left.value.code == 4


def test_unexpected_errors_of_the_root_are_not_held_back():
    def fail():
        raise TypeError("a fault")

    with pytest.raises(TypeError, match="a fault"):
        on_root(SerialCommunicator(), fail, ValueError)
