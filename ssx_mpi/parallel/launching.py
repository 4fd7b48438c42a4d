"""Starting on the ranks that there are, and ending all of them when one fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ssx_mpi.parallel.communicator import Communicator, MpiCommunicator, SerialCommunicator
from ssx_mpi.report.progress import TERMINAL

# what launchers tell their processes: the number of ranks that they started
_LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE")

# by which a user or a site has settled the binding
_BINDING_VARIABLES = (
    "OMPI_MCA_hwloc_base_binding_policy",
    "PRTE_MCA_hwloc_default_binding_policy",
    "PRTE_MCA_bindto",
    "HYDRA_BINDING",
)


class LaunchError(Exception):
    """The launcher and the MPI library do not belong together; one line for the user."""


def launcher_size() -> int | None:
    """Number of ranks that mpirun, mpiexec or srun says it started; None when started plainly."""
    for name in _LAUNCHER_SIZES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    # SLURM_NTASKS alone is there in a batch script too; a step started by srun has its own size and a process number
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" in os.environ and "PMIX_RANK" in os.environ:
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    if os.environ.get("SLURM_STEP_ID", "").isdigit() and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return None


def world() -> Communicator:
    """The communicator of all ranks of this job.

    Raises
    ------
    LaunchError
        When the launcher started several processes that the MPI library does not connect.
    """
    expected = launcher_size()
    if expected is None:
        return SerialCommunicator()
    from mpi4py import MPI

    size = MPI.COMM_WORLD.size
    if size != expected:
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise LaunchError(
            f"the launcher started {expected} processes, but MPI connects {size}: mpi4py uses {library}, "
            "so start the program with the launcher of that MPI"
        )
    return MpiCommunicator(MPI.COMM_WORLD) if size > 1 else SerialCommunicator()


def usable_cores() -> int:
    """Cores that this process may use: the smaller of its affinity and its cgroup quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return max(1, min(cores, int(quota))) if quota else cores


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = (root / "cpu/cpu.cfs_quota_us").read_text()
        return int(limit) / int((root / "cpu/cpu.cfs_period_us").read_text()) if int(limit) > 0 else None
    except (OSError, ValueError):
        return None


def start_on_ranks(module: str, arguments: list[str], n_ranks: int) -> None:
    """Replace this process by one that runs `mpiexec` with `n_ranks` ranks of ``python -m module arguments``.

    Call before MPI is initialised. Does nothing when already under a launcher, or when one rank is wanted.

    Raises
    ------
    LaunchError
        When there is no mpiexec.
    """
    if launcher_size() is not None or n_ranks == 1:
        return
    mpiexec = shutil.which("mpiexec") or shutil.which("mpirun")
    if mpiexec is None:
        raise LaunchError(f"no mpiexec on the PATH to start {n_ranks} ranks with: install MPI, or give nproc=1")
    # Open MPI counts cores its own way and refuses more ranks than that, and refuses root, who started us already
    known = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout
    for name, value in _oversubscribing(known).items():
        os.environ.setdefault(name, value)
    if os.geteuid() == 0:
        os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
        os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    if sys.stderr.isatty():
        # mpiexec reads what ranks write through a pipe: they cannot see for themselves that it ends on a terminal
        os.environ[TERMINAL] = str(shutil.get_terminal_size().columns)
    print(f"Starting on {n_ranks} ranks with {mpiexec} (nproc= sets the number)", flush=True)
    command = [mpiexec, "-n", str(n_ranks), *_options(known, n_ranks), sys.executable, "-m", module, *arguments]
    os.execv(sys.executable, [sys.executable, "-m", "ssx_mpi.parallel.relay", *command])


def _oversubscribing(known: str) -> dict[str, str]:
    """What has the launcher that says `known` of its version start more ranks than it counts cores."""
    if "OpenRTE" in known:
        return {"OMPI_MCA_rmaps_base_oversubscribe": "1"}
    version = re.search(r"Open MPI\) (\d+)", known)
    if version is None:
        return {}
    # version 6 says in seven lines that the name of version 5 is deprecated
    name = "PRTE_MCA_rmaps_default_mapping_policy" if int(version.group(1)) < 6 else "PRTE_MCA_mapby"
    return {name: ":oversubscribe"}


def _options(known: str, n_ranks: int) -> list[str]:
    """Options that bind each rank to a core when there is one for each, and leave them free otherwise.

    `known` is what the launcher says of its version.

    Launchers bind from the first core on. Runs beside each other would share those and leave the others idle, so ranks
    that do not fill the machine are not bound.

    Open MPI says in ten lines below ours that the job was aborted, whatever exit code but 0 it has: it is told not to.
    """
    # the process that starts ranks needs it, not the ranks
    from ssx_mpi.parallel.relay import QUIET

    options = [QUIET] if "OpenRTE" in known else []
    binds = "Open MPI" in known or "OpenRTE" in known or "HYDRA" in known
    if binds and not any(name in os.environ for name in _BINDING_VARIABLES):
        options += ["--bind-to", "core" if n_ranks == _physical_cores() else "none"]
    return options


def _physical_cores(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores that this process may use, those that run several threads counted once."""
    cpus = os.sched_getaffinity(0)
    try:
        cores = {(root / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus}
    except OSError:
        return len(cpus)
    return len(cores)


def guarded(main: Callable[[Communicator], int]) -> None:
    """Run ``main(world())`` and exit with the status that it returns.

    Whatever else ends `main` on a rank, an exception or a non-zero ``sys.exit``, ends all ranks at once: a rank that
    only left would make the others, and its own MPI_Finalize, wait for ever.
    """
    try:
        comm = world()
    except LaunchError as error:
        # every process says so unless one of them is enough: there is no communicator to agree over
        if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")) == "0":
            print(f"ssx_mpi: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    try:
        status = main(comm)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if status and comm.size > 1:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            comm.abort(status)
        raise
    except BaseException:
        sys.stderr.write(f"ssx_mpi: rank {comm.rank} of {comm.size} on {os.uname().nodename} failed:\n")
        traceback.print_exc()
        if comm.size > 1:
            comm.abort(1)
        sys.exit(1)
    # the ranks agree on the status, so that none waits for another in MPI_Finalize with a launcher that kills on error
    statuses = comm.allgather(status)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(max(statuses))
