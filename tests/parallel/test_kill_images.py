"""Images that take the process down, or for ever, and data of which nearly all fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stills import Stills, reflections

FAULTY = Path(__file__).with_name("faulty.py")


@pytest.fixture
def few(stills) -> Stills:
    """Six of the images, three of them hits: one batch."""
    return Stills(Path(f"{stills.image}:13:18"))


def run(few, directory, fault, *more) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FAULTY), fault, *few.arguments(directory, "nproc=1", *more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def summary(directory) -> dict:
    return json.loads((directory / "ssx_mpi.json").read_text())


@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        ("segfault", -11, "Segmentation fault"),
        ("hang", 1, "hung in a library"),
        ("error", 1, "TypeError: a fault in the program"),
    ],
)
def test_an_image_that_ends_the_process_twice_is_set_aside(few, tmp_path, fault, code, reason):
    directory = tmp_path / "run"
    for _ in range(2):
        assert run(few, directory, f"{fault}:2", "image_timeout=2").returncode == code
    last = run(few, directory, f"{fault}:2")
    assert last.returncode == 0, last.stderr
    assert summary(directory)["left_out"] == [["x.nxs:15", "crash", f"ended the process 2 times: {reason}"]]
    assert "x.nxs:15 left out at crash" in last.stdout
    assert summary(directory)["total"]["counts"]["images"] == 6
    # and it stays so, without another trial
    again = run(few, directory, f"{fault}:2")
    assert again.returncode == 0
    assert summary(directory)["left_out"][0][0] == "x.nxs:15"


def test_an_image_that_takes_too_long_is_abandoned_and_counted(few, tmp_path):
    directory = tmp_path / "run"
    done = run(few, directory, "slow:1", "image_timeout=2")
    assert done.returncode == 0, done.stderr
    assert summary(directory)["left_out"] == [["x.nxs:14", "timeout", "took longer than image_timeout"]]
    assert summary(directory)["total"]["counts"]["images"] == 6


def test_when_nearly_all_fails_the_job_stops_and_says_why(few, tmp_path):
    directory = tmp_path / "run"
    done = run(few, directory, "unreadable:all", "max_failures=0.5")
    assert done.returncode == 4
    assert "5 of 5 images failed in one way (read: cannot be read), over max_failures=0.5" in done.stdout
    assert summary(directory)["state"] == "too_many_failures"
    # repaired, the same command goes on
    assert run(few, directory, "none:-1").returncode == 0
    assert reflections(directory) is not None
