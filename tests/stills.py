"""Runs of the program on a small simulated data set, started, asked to stop and killed by tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
from small_chips import SYMMETRY, small_chip

#: environment of a run that is to be disturbed at its work
SLOWLY = {"PYTHONPATH": str(Path(__file__).with_name("parallel") / "slowly")}


@dataclass(frozen=True)
class Stills:
    """A simulated data set, and how to process it."""

    image: Path

    @classmethod
    def simulated(cls, image: Path, n_images: int = 24) -> Stills:
        """Stills of 0.2 Mpx, half of them hits with one lattice."""
        small_chip(image, 100.0, strong=False, n_images=n_images, hit_rate=0.5, seed=5)
        return cls(image)

    def arguments(self, directory: Path, *more: str) -> list[str]:
        given = [
            f"image={self.image}",
            *SYMMETRY,
            f"reference_geometry={self.image.parent}/truth.expt",
        ]
        return [*given, "batch_size=6", f"output.directory={directory}", *more]

    def start(self, directory: Path, *more: str, nproc: int = 2, **options) -> subprocess.Popen:
        """The program at work, slow enough to be disturbed, its output in ``terminal.log`` beside `directory`."""
        return self._start(directory, *more, f"nproc={nproc}", environment=SLOWLY, **options)

    def _start(
        self,
        directory: Path,
        *more: str,
        environment: dict[str, str],
        launcher: Sequence[str] = (),
        log: Path | None = None,
        **options,
    ) -> subprocess.Popen:
        command = [*launcher, sys.executable, "-m", "ssx_mpi", *self.arguments(directory, *more)]
        options["env"] = {
            **os.environ,
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "PRTE_MCA_mapby": ":oversubscribe",
            **environment,
        }
        with (log or directory.with_name("terminal.log")).open("a") as terminal:
            return subprocess.Popen(command, stdout=terminal, stderr=terminal, **options)

    def run(self, directory: Path, *more: str, nproc: int = 2, **options) -> int:
        """Exit code of the whole program."""
        return self._start(directory, *more, f"nproc={nproc}", environment={}, **options).wait(timeout=240)


def terminal(directory: Path) -> str:
    """What the runs in `directory` have written to the terminal."""
    return directory.with_name("terminal.log").read_text()


def wait_for(condition, process: subprocess.Popen, seconds: float = 120.0) -> None:
    """Wait until `condition` holds; fails when the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before it could be disturbed"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def journalled(directory: Path) -> int:
    """Bytes in the journals of the run."""
    sizes = []
    for path in directory.glob("batch_*/journal"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return sum(sizes)


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Process numbers of the ranks."""
    from ssx_mpi.parallel import relay

    return [p for p in relay.descendants(launcher.pid) if relay.is_rank(p)]


def kill_all(launcher: subprocess.Popen) -> None:
    """End launcher and ranks without a word, as the loss of a machine does."""
    from ssx_mpi.parallel import relay

    for process in [launcher.pid, *relay.descendants(launcher.pid)]:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait(timeout=30)


def reflections(directory: Path) -> dict[str, tuple]:
    """Columns, identifiers and number of rows of every reflection file of the batches, by its path."""
    found = {}
    for path in sorted(directory.glob("batch_*/*.refl")):
        _, _, content = msgpack.unpackb(path.read_bytes(), strict_map_key=False, max_bin_len=2**32 - 1)
        columns = {name: items[1] for name, items in content["data"].items()}
        found[str(path.relative_to(directory))] = (columns, content["identifiers"], content["nrows"])
    return found
