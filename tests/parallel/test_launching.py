"""Starting on the right ranks, and ending all of them at once when one fails."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from support import run, run_mpi

from ssx_mpi.parallel import launching
from ssx_mpi.parallel.communicator import SerialCommunicator

_ALL = [
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE", "PMIX_RANK"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS"),
]


@pytest.fixture
def environment(monkeypatch):
    """Sets just these launcher variables."""

    def only(**values: str) -> None:
        for name in _ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return only


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "3"}, 3),
        ({"SLURM_NTASKS": "8"}, None),  # a batch script, not a step
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "2"}, 6),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMIX_RANK": "0"}, 1),
        # mpirun inside a batch script of many tasks knows better
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_NTASKS": "8"}, 2),
    ],
)
def test_what_launchers_say(environment, variables, size):
    environment(**variables)
    assert launching.launcher_size() == size


def test_started_plainly_is_one_process_alone(environment):
    environment()
    assert isinstance(launching.world(), SerialCommunicator)


def test_singletons_of_another_launcher_are_told_apart(environment):
    # as MPICH's mpiexec does it with an mpi4py for Open MPI: four programs, none of which knows the others
    program = "from ssx_mpi.parallel import launching; launching.guarded(lambda comm: print('worked') or 0)"
    done = run([sys.executable, "-c", program], timeout=60, PMI_SIZE="4", PMI_RANK="0")
    assert done.status == 2
    assert "started 4 processes" in done.err
    assert "MPI connects 1" in done.err
    assert "Traceback" not in done.text
    assert "worked" not in done.out


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_cgroup_quota(tmp_path, files, quota):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert launching._cgroup_quota(tmp_path) == quota


def test_usable_cores_are_at_least_one_and_at_most_the_affinity(monkeypatch):
    monkeypatch.setattr(launching.os, "sched_getaffinity", lambda pid: set(range(8)))
    for quota, cores in ((None, 8), (0.5, 1), (2.9, 2), (64.0, 8)):
        monkeypatch.setattr(launching, "_cgroup_quota", lambda quota=quota: quota)
        assert launching.usable_cores() == cores


def test_without_mpiexec_it_says_what_to_do(environment, monkeypatch, tmp_path):
    environment()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(launching.LaunchError, match="nproc=1"):
        launching.start_on_ranks("ssx_mpi", [], 2)


@pytest.mark.parametrize(
    ("version", "n_ranks", "options"),
    [
        ("mpiexec (OpenRTE) 4.1.4", 4, ["-q", "--bind-to", "core"]),
        ("HYDRA build details:", 4, ["--bind-to", "core"]),
        # fewer than cores: another run may be beside this one
        ("mpiexec (OpenRTE) 4.1.4", 2, ["-q", "--bind-to", "none"]),
        ("mpirun (Open MPI) 5.0.1", 8, ["--bind-to", "none"]),
        ("another launcher", 4, []),
    ],
)
def test_ranks_are_bound_when_they_fill_the_cores(monkeypatch, tmp_path, version, n_ranks, options):
    for name in launching._BINDING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # eight threads on four cores
    for cpu in range(8):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(launching.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert launching._physical_cores(tmp_path) == 4
    monkeypatch.setattr(launching, "_physical_cores", lambda: 4)
    assert launching._options(version, n_ranks) == options
    monkeypatch.setenv("HYDRA_BINDING", "numa")
    assert launching._options(version, n_ranks) == [option for option in options if option == "-q"]


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("mpiexec (OpenRTE) 4.1.4", "OMPI_MCA_rmaps_base_oversubscribe"),
        ("mpiexec (Open MPI) 5.0.11", "PRTE_MCA_rmaps_default_mapping_policy"),
        ("mpiexec (Open MPI) 6.0.0rc2", "PRTE_MCA_mapby"),
        ("HYDRA build details:", None),
    ],
)
def test_each_launcher_is_told_in_its_own_words_to_start_more_ranks_than_cores(version, name):
    assert list(launching._oversubscribing(version)) == ([name] if name else [])


def test_no_launcher_is_started_from_within_one(environment, monkeypatch):
    environment(OMPI_COMM_WORLD_SIZE="2")
    monkeypatch.setattr(launching.os, "execv", lambda *a: pytest.fail("started mpiexec on a rank"))
    launching.start_on_ranks("ssx_mpi", [], 2)


FAILING = """
import signal
import subprocess
import sys
from ssx_mpi.parallel import launching

def main(comm):
    if comm.rank == comm.size - 1:
        {fault}
    comm.barrier()
    comm.barrier()
    return 0

launching.guarded(main)
"""


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("raise ValueError('rank with a fault')", 1, "ValueError: rank with a fault"),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('a message')", 1, "a message"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
    ],
)
def test_a_rank_that_fails_ends_all_within_seconds(tmp_path, fault, status, said):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(fault=fault))
    began = time.monotonic()
    done = run_mpi(3, [script], timeout=60)
    assert time.monotonic() - began < 30
    assert done.status == status, done.text
    assert said in done.err
    if fault.startswith("raise"):
        assert "rank 2 of 3" in done.err


def test_the_highest_status_is_that_of_the_job(tmp_path):
    script = tmp_path / "agreeing.py"
    script.write_text(
        "from ssx_mpi.parallel import launching\nlaunching.guarded(lambda comm: 3 if comm.rank == 1 else 0)\n"
    )
    assert run_mpi(3, [script], timeout=60).status == 3


def test_one_process_that_fails_has_a_traceback_and_status_one(environment, capsys):
    environment()

    def main(comm):
        raise ZeroDivisionError("fault")

    with pytest.raises(SystemExit) as left:
        launching.guarded(main)
    assert left.value.code == 1
    assert "ZeroDivisionError: fault" in capsys.readouterr().err


def test_a_launcher_that_is_not_there_is_named():
    program = run([sys.executable, "-m", "ssx_mpi.parallel.relay", "no-such-mpirun", "-n", "2"], timeout=30)
    assert program.status == 2
    assert program.err.strip() == "ssx_mpi: no-such-mpirun cannot be started: No such file or directory"


def test_a_launcher_without_ranks_here_is_asked_by_a_signal_that_it_knows(tmp_path):
    # such as Hydra, whose ranks are on other nodes
    script = tmp_path / "launcher.py"
    script.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-m", "ssx_mpi.parallel.relay", sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as relay:
        relay.stdout.readline()
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(timeout=50) == 75


def test_a_rank_that_is_killed_is_named_in_one_line():
    program = run([sys.executable, "-m", "ssx_mpi.parallel.relay", "sh", "-c", "kill -9 $$"], timeout=30)
    assert program.status == 137
    assert program.err.strip() == "ssx_mpi: ended by signal 9; the same command goes on"


def test_an_mpiexec_that_starts_nothing_and_says_nothing_is_named(tmp_path):
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text("#!/bin/sh\nexit 1\n")
    mpiexec.chmod(0o755)
    command = [str(mpiexec), "-n", "9", "-q", sys.executable, "-m", "ssx_mpi"]
    program = run([sys.executable, "-m", "ssx_mpi.parallel.relay", *command], timeout=30)
    assert program.status == 1
    why = f"{mpiexec} ended with 1 and started nothing; this tells why: {mpiexec} -n 9 true"
    assert program.err.strip() == f"ssx_mpi: {why}"
