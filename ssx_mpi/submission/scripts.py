"""Job scripts for Slurm, put together from blocks, so that those in ``jobscripts/`` and those submitted are the same.

A script begins with one marked block of site settings; the rest is the same at every site. It starts the program in
the background and waits, because bash runs a trap only when it is not waiting for a program in the foreground.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

KINDS = ("one_node", "many_nodes", "array", "chain", "reduce")


@dataclass(frozen=True)
class Site:
    """What differs between sites and jobs; None leaves it to the site's default.

    Attributes
    ----------
    nodes, ranks_per_node
        Size of the job; without the latter, as many ranks as the node has cores.
    time
        As Slurm writes it.
    partition, account, qos, constraint
        As for sbatch.
    modules
        To load, in this order.
    setup
        A line of bash that makes the program available, where modules do not.
    launcher
        "srun" or "mpirun".
    mpi
        Value of ``srun --mpi=``.
    stage
        "local" copies the Python environment to each node's own disk first.
    name
        Of the job.
    tasks
        Number of runs of an array.
    """

    nodes: int = 1
    ranks_per_node: int | None = None
    time: str = "01:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    modules: tuple[str, ...] = ()
    setup: str | None = None
    launcher: str = "srun"
    mpi: str | None = None
    stage: str | None = None
    name: str = "ssx_mpi"
    tasks: int = 1


# where the shell that submits has modules, the job has; elsewhere the system's profile brings them
_MODULES = "type module >/dev/null 2>&1 || . /etc/profile"

_TITLES = {
    "one_node": """\
# All cores of one node.
#   sbatch one_node.sh image=data_master.h5 space_group=P43212 unit_cell=79.1,79.1,38.2,90,90,90""",
    "many_nodes": """\
# All cores of several nodes.
#   sbatch --nodes=8 many_nodes.sh image=data_master.h5 space_group=P43212 unit_cell=79.1,79.1,38.2,90,90,90""",
    "array": """\
# One run for each chip or sample, as an array. Each line of a file gives the parameters that differ between the runs:
#   image=chip_1_master.h5 output.directory=chip_1
# All other parameters follow it:
#   sbatch --array=1-12%4 array.sh runs.txt space_group=P43212 unit_cell=79.1,79.1,38.2,90,90,90""",
    "chain": """\
# A long run in short jobs: when the time is over the job puts itself into the queue again, until all images are done.
#   sbatch chain.sh image=data_master.h5 space_group=P43212 unit_cell=79.1,79.1,38.2,90,90,90""",
    "reduce": """\
# Reduction of several runs together, as a job that waits for them; each of them reduces its own crystals already.
#   sbatch --dependency=afterok:JOB --kill-on-invalid-dep=yes reduce.sh directory=run1 directory=run2""",
}


def render(kind: str, site: Site, arguments: list[str] | None = None) -> str:
    """The job script of `kind`, one of :data:`KINDS`; without `arguments` it takes them from its own command line."""
    blocks = [
        "#!/bin/bash",
        _TITLES[kind],
        _FIXED[kind].replace("@LEAD@", str(lead_seconds(site.time))),
        _settings(kind, site),
        _ENVIRONMENT,
        _STAGING if site.stage == "local" else "",
        _launching(site),
        _BODY[kind].replace("ARGUMENTS", shlex.join(arguments) if arguments else '"$@"'),
    ]
    return "\n\n".join(block.strip("\n") for block in blocks if block) + "\n"


def lead_seconds(time: str) -> int:
    """How long before the end of `time`, a limit as Slurm writes it, a job is told to come to an end."""
    days, dash, clock = time.rpartition("-")
    numbers = [int(n) if n.isdigit() else 0 for n in clock.split(":")]
    # minutes, minutes:seconds, hours:minutes:seconds; after days: hours and so on
    first = [] if dash or len(numbers) > 2 else [0]
    hours, minutes, seconds = [*first, *numbers, 0, 0][:3]
    total = 86400 * (int(days) if days.isdigit() else 0) + 3600 * hours + 60 * minutes + seconds
    return min(_LEAD, total // _LEAD_PART) if total else _LEAD


def _settings(kind: str, site: Site) -> str:
    options = [
        ("job-name", site.name),
        ("nodes", str(site.nodes)),
        ("time", site.time),
        ("partition", site.partition),
        ("account", site.account),
        ("qos", site.qos),
        ("constraint", site.constraint),
    ]
    lines = [f"#SBATCH --{name}={value}" if value else f"##SBATCH --{name}=" for name, value in options]
    if kind == "array":
        lines.append(f"#SBATCH --array=1-{site.tasks}")
    lines += [
        "# ranks on each node; empty for one on each core",
        f"RANKS_PER_NODE=${{RANKS_PER_NODE:-{site.ranks_per_node or ''}}}",
        "# how ranks are started: srun, with the --mpi= that this MPI needs where it is not the default, or mpirun",
        f"LAUNCHER=${{LAUNCHER:-{site.launcher}}}",
        f"SRUN_MPI=${{SRUN_MPI:-{site.mpi or ''}}}",
        "# how the program gets onto the PATH",
        *([_MODULES] if site.modules else []),
        *(f"module load {module}" for module in site.modules),
        site.setup or f"# {_MODULES}; module load ssx_mpi",
    ]
    return "\n".join(["# ==== site settings: adapt these ====", *lines, "# ==== end of site settings ===="])


_WHOLE_NODES = """\
#SBATCH --exclusive
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
# the script is told @LEAD@ s before the time is over, and asks the ranks to come to an end
#SBATCH --signal=B:USR1@@LEAD@"""

# a job is told to end so long before its time is over, in seconds, and when less than a part of the time is left: Slurm
# tells a short one at its very start otherwise
_LEAD, _LEAD_PART = 120, 4

_FIXED = {
    "one_node": _WHOLE_NODES + "\n#SBATCH --no-requeue",
    "many_nodes": _WHOLE_NODES + "\n#SBATCH --no-requeue",
    "array": _WHOLE_NODES.replace("%x_%j", "%x_%A_%a") + "\n#SBATCH --no-requeue",
    # when a node dies, Slurm itself puts the job into the queue again
    "chain": _WHOLE_NODES + "\n#SBATCH --requeue",
    "reduce": _WHOLE_NODES + "\n#SBATCH --no-requeue",
}

_ENVIRONMENT = """\
# a word of the end that comes before there are ranks to ask
stopping= cancelled=
trap 'stopping=yes' USR1
trap 'stopping=yes cancelled=yes' TERM
# one thread to a rank, and no locks on files that are only read, which some parallel file systems do not have
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1
export HDF5_USE_FILE_LOCKING=FALSE
# the program stops ahead of the end of the job; older versions of Slurm do not say when that is
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    SLURM_JOB_END_TIME=$(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s) || SLURM_JOB_END_TIME=
    export SLURM_JOB_END_TIME
fi
RANKS=$((SLURM_JOB_NUM_NODES * ${RANKS_PER_NODE:-$SLURM_CPUS_ON_NODE}))
command -v ssx_mpi >/dev/null || { echo "ssx_mpi is not on the PATH: see the site settings"; exit 2; }"""

_STAGING = """\
# The Python environment goes to each node's own disk once, as one file, so that the ranks do not ask the shared file
# system for thousands of small ones. What lies outside of it (a system's DIALS) stays where it is.
LOCAL=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/ssx_mpi.$SLURM_JOB_ID
PREFIX=$(dirname "$(dirname "$(command -v ssx_mpi)")")
ARCHIVE=$PWD/.ssx_mpi_environment.$SLURM_JOB_ID.tar
once_on_each_node() { srun --mpi=none --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$@"; }
echo "Copying $PREFIX to $LOCAL on each node"
tar --create --file="$ARCHIVE" --directory="$PREFIX" . &&
    once_on_each_node bash -c \
        'mkdir -p "$0/$SLURMD_NODENAME" && tar --extract --file="$1" --directory="$0/$SLURMD_NODENAME"' \
        "$LOCAL" "$ARCHIVE" || { echo "Copying failed"; rm -f "$ARCHIVE"; exit 1; }
rm -f "$ARCHIVE"
trap 'once_on_each_node rm -rf "$LOCAL"' EXIT
from_local_disk() {
    local here=$LOCAL/$SLURMD_NODENAME/bin program=$1
    shift
    exec "$here/python" "$here/$program" "$@"
}
export LOCAL
export -f from_local_disk"""

_LAUNCHING = """\
# Ranks end with 0 or 3 (done, with or without crystals), 2 or 4 (someone must look), or 75 (stopped with work left).
# Any other code is that of a crash: what is finished stays finished, so the program is started again; the image that
# took it down twice is set aside.
# restart=True is for the first start alone
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || export SSX_MPI_GO_ON=yes
ask_ranks_to_stop() {
    stopping=yes
    kill -USR2 "${step:-}" 2>/dev/null
}
trap ask_ranks_to_stop USR1
# Slurm lets the other ranks wait for one that was killed; they get 20 s, and those of an orderly end need less
on_all_ranks() {
    status=75
    [ -z "$stopping" ] || return
    for attempt in 1 2 3; do
        case $LAUNCHER in
            srun)
                srun ${SRUN_MPI:+--mpi=$SRUN_MPI} --ntasks="$RANKS" --cpu-bind=cores --wait=20 @FROM@"$@" &
                ;;
            *) ssx_mpi.launch mpirun -n "$RANKS" --bind-to core @FROM@"$@" & ;;
        esac
        step=$!
        while kill -0 "$step" 2>/dev/null; do
            wait "$step"
            status=$?
        done
        case $status in 0 | 2 | 3 | 4 | 75) return ;; esac
        echo "Attempt $attempt ended with exit code $status"
        # asked to stop before they could listen
        [ -z "$stopping" ] || { status=75; return; }
        export SSX_MPI_GO_ON=yes
    done
}"""


def _launching(site: Site) -> str:
    return _LAUNCHING.replace("@FROM@", "bash -c 'from_local_disk \"$@\"' -- " if site.stage == "local" else "")


_RUN = """\
on_all_ranks ssx_mpi ARGUMENTS
"""

_BODY = {
    "one_node": _RUN + "exit $status",
    "many_nodes": _RUN + "exit $status",
    "array": """\
set -- ARGUMENTS
runs=$1
shift
# empty lines do not count, nor what Windows puts at the end of one
read -r -a own <<<"$(tr -d '\\r' <"$runs" | grep '[^[:space:]]' | sed -n "${SLURM_ARRAY_TASK_ID}p")"
[ ${#own[@]} -gt 0 ] || { echo "$runs has no line $SLURM_ARRAY_TASK_ID"; exit 2; }
on_all_ranks ssx_mpi "${own[@]}" "$@"
exit $status""",
    "chain": _RUN
    + """\
if [ "$status" = 75 ] && [ -z "$cancelled" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MOST_RESTARTS:-100}" ]; then
    echo "The time is over: going on in the next job, number $((${SLURM_RESTART_COUNT:-0} + 2))"
    scontrol requeue "$SLURM_JOB_ID"
    # until Slurm ends this job
    sleep 60
fi
exit $status""",
    "reduce": """\
on_all_ranks ssx_mpi.reduce ARGUMENTS
exit $status""",
}
