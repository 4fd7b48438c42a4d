"""Ranks that hang, and launchers that are asked to stop, for real under mpiexec."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stills import SLOWLY, journalled, kill_all, reflections, wait_for
from support import plain_environment

FAULTY = Path(__file__).with_name("faulty.py")


@pytest.fixture
def mpirun(tmp_path):
    """A function that starts Python with arguments on ranks of the launcher itself; what they say is in ``out``."""
    program = shutil.which("mpiexec")
    if program is None:
        pytest.skip("there is no mpiexec")
    started: list[subprocess.Popen] = []

    def start(n: int, *arguments: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
        command = [*before, program, "-n", str(n), sys.executable, *arguments]
        with (tmp_path / "out").open("w") as out:
            process = subprocess.Popen(command, env=plain_environment(**environment), stdout=out, stderr=out)
        started.append(process)
        return process

    yield start
    for process in started:
        kill_all(process)


# rank 2 keeps the results of the first images that rank 0 does; of rank 0 itself the next one tells, on the terminal
@pytest.mark.parametrize("silent", ["2", "0"])
def test_a_rank_of_which_nothing_is_heard_is_named(stills, mpirun, tmp_path, silent):
    directory = tmp_path / "run"
    process = mpirun(3, str(FAULTY), f"rank_silent:{silent}", *stills.arguments(directory))
    assert process.wait(timeout=200) == 0, (tmp_path / "out").read_text()
    log = (tmp_path / "out" if silent == "0" else directory / "ssx_mpi.log").read_text()
    host = re.escape(os.uname().nodename)
    found = re.findall(rf"Nothing heard of rank (\d) on {host} for (\d+) s, at image (\S+) for (\d+) s", log)
    assert found, log
    rank, silence, image, since = found[-1]
    assert rank == silent
    assert image.startswith("x.nxs:")
    assert 2 <= int(silence) <= 30
    assert 1 <= int(since) <= 30
    assert json.loads((directory / "ssx_mpi.json").read_text())["total"]["counts"]["images"] == 24


def test_a_rank_that_is_stuck_in_a_library_does_not_keep_the_others_from_stopping(stills, mpirun, tmp_path):
    directory = tmp_path / "run"
    process = mpirun(2, str(FAULTY), "rank_hang:1", *stills.arguments(directory), **SLOWLY)
    wait_for(lambda: journalled(directory) > 1000, process)
    wait_for(lambda: "Nothing heard of rank" in (directory / "ssx_mpi.log").read_text(), process)
    for rank in ranks_of_program(process):
        os.kill(rank, signal.SIGTERM)
    assert process.wait(timeout=120) == 75, (tmp_path / "out").read_text()
    assert "not stopped in order within 3 s of the request" in (tmp_path / "out").read_text()


def ranks_of_program(launcher: subprocess.Popen) -> list[int]:
    """Processes of the program that runs below `launcher`."""
    from ssx_mpi.parallel import relay

    return [
        p for p in relay.descendants(launcher.pid) if str(FAULTY).encode() in Path(f"/proc/{p}/cmdline").read_bytes()
    ]


def test_a_request_to_mpirun_itself_ends_in_order(stills, mpirun, tmp_path):
    directory = tmp_path / "run"
    process = mpirun(2, "-m", "ssx_mpi", *stills.arguments(directory), **SLOWLY)
    wait_for(lambda: journalled(directory) > 1000, process)
    # the one that Open MPI passes on, or MPICH
    version = subprocess.run([process.args[0], "--version"], capture_output=True, text=True, timeout=20, check=True)
    process.send_signal(signal.SIGUSR1 if "HYDRA" in version.stdout else signal.SIGUSR2)
    assert process.wait(timeout=90) == 75, (tmp_path / "out").read_text()
    assert state(directory) == "stopped"
    assert not (directory / "in_hand").exists()


def test_a_request_to_mpirun_that_would_kill_goes_to_the_ranks(stills, mpirun, tmp_path):
    directory = tmp_path / "run"
    launch, script = (str(Path(sys.executable).with_name(name)) for name in ("ssx_mpi.launch", "ssx_mpi"))
    process = mpirun(2, script, *stills.arguments(directory), before=(launch,), **SLOWLY)
    wait_for(lambda: journalled(directory) > 1000, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) == 75, (tmp_path / "out").read_text()
    assert "Stopped on request (SIGTERM)" in (tmp_path / "out").read_text()


def test_mpirun_that_is_terminated_loses_nothing(stills, undisturbed, mpirun, tmp_path):
    # it ends the ranks a second or two after it has told them, with an exit code of its own
    directory = tmp_path / "run"
    process = mpirun(2, "-m", "ssx_mpi", *stills.arguments(directory), **SLOWLY)
    # the state is written by rank 0, the journals by all
    wait_for(lambda: journalled(directory) > 1000 and (directory / "ssx_mpi.json").exists(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) != 0
    assert state(directory) in ("running", "stopped")
    assert journalled(directory) > 1000 or list(directory.glob("batch_*/batch.json"))
    assert stills.run(directory) == 0
    assert reflections(directory) == undisturbed


def state(directory: Path) -> str:
    return json.loads((directory / "ssx_mpi.json").read_text())["state"]
