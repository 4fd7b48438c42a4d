"""A Slurm of two nodes on this machine, listening on the loopback interface alone, for tests; needs root.

Both nodes are this machine under two names. That is enough for everything that a batch system does to a job: limits,
signals, requeueing, dead nodes. MPI takes the ranks of both for ranks of one node, so it is told not to use shared
memory between them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

NODES = ("node1", "node2")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_PMIX = Path("/usr/lib/x86_64-linux-gnu/pmix2/lib")
# below those that the system gives out by itself
_PORTS = range(16900, 30000, 20)

_CONFIGURATION = """\
ClusterName=ssx
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
TmpFS={home}/tmp/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
MpiDefault=pmix
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here; empty when there can."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)} missing)"
    if os.geteuid() != 0:
        return "a Slurm of several nodes on one machine needs root"
    if not (_PMIX / "libpmix.so").exists():
        return "libpmix-dev is not installed: srun could not start MPI ranks"
    return ""


_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


@dataclass(frozen=True)
class Cluster:
    """A running Slurm whose files are all below `home`."""

    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """For its commands, and, passed on by sbatch, for MPI in its jobs."""
        return {
            **os.environ,
            "PATH": _PATH,
            "SLURM_CONF": str(self.home / "slurm.conf"),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_btl": "self,tcp",
            "OMPI_MCA_btl_tcp_if_include": "lo",
            "OMPI_MCA_oob_tcp_if_include": "lo",
            "OMPI_MCA_hwloc_base_binding_policy": "none",
        }

    def start(self) -> None:
        """Start all daemons and wait for the nodes."""
        for name in ("state", "log", *(f"spool/{n}" for n in NODES), *(f"tmp/{n}" for n in NODES)):
            (self.home / name).mkdir(parents=True)
        key = self.home / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        port = next(p for p in _PORTS if all(map(_is_free, (p, p + 4, p + 5))))
        text = _CONFIGURATION.format(home=self.home, port=port, first=port + 4, last=port + 5)
        (self.home / "slurm.conf").write_text(text)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        self.call("munged", *(f"--{o}={self.home / f}" for o, f in files.items()), f"--log-file={self.home}/log/munged")
        self.call("slurmctld", "-c")
        for node in NODES:
            self.call("slurmd", "-N", node)
        self.wait(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 60)

    def stop(self) -> None:
        """End all jobs and all daemons."""
        self.call("scancel", "--user=root", check=False)
        for name in (*(f"slurmd.{n}" for n in NODES), "slurmctld", "munged"):
            pid = self.home / f"{name}.pid"
            if pid.exists():
                _end(int(pid.read_text()))

    def kill_node(self, node: str) -> None:
        """The node is gone without a word, with everything that ran on it."""
        number = int((self.home / f"slurmd.{node}.pid").read_text())
        os.kill(number, signal.SIGKILL)
        for stat in Path("/proc").glob("[0-9]*"):
            try:
                environment = (stat / "environ").read_bytes()
            except OSError:
                continue
            if (
                f"SLURMD_NODENAME={node}".encode() in environment.split(b"\0")
                and str(self.home).encode() in environment
            ):
                os.kill(int(stat.name), signal.SIGKILL)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def ranks(self, job: str) -> dict[int, int]:
        """Process numbers of the ranks of `job` that are at work now, by rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURM_JOB_ID={job}".encode() not in environment or f"{self.home}/".encode() not in b"".join(
                v for v in environment if v.startswith(b"SLURM_CONF=")
            ):
                continue
            number = next((v[13:] for v in environment if v.startswith(b"SLURM_PROCID=")), None)
            if number is not None and any(word.endswith(b"/ssx_mpi") for word in words[1:2]):
                found[int(number)] = int(process.name)
        return found

    def revive_node(self, node: str) -> None:
        """The node is back."""
        self.call("slurmd", "-N", node)
        self.call("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def call(self, *command: str, check: bool = True, **options) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, **options
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Number of the job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=cwd,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def state(self, job: str) -> dict[str, str]:
        """What Slurm says of `job`, by its own names."""
        text = self.call("scontrol", "show", "job", job, "-o").splitlines()[0]
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def finished(self, job: str, seconds: float) -> dict[str, str]:
        """Wait until `job` is over; what Slurm says of it then."""
        over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY")
        self.wait(lambda: self.state(job)["JobState"] in over, seconds)
        return self.state(job)

    @staticmethod
    def wait(condition, seconds: float) -> None:
        """Wait until `condition` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.3)


def _is_free(port: int) -> bool:
    with socket.socket() as trial:
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _end(process: int) -> None:
    try:
        os.kill(process, signal.SIGTERM)
        for _ in range(200):
            os.kill(process, 0)
            time.sleep(0.1)
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
