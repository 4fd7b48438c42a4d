"""A disk that is full, or a folder that loses its permission: the run stops with the reason, and goes on later."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from stills import journalled, kill_all, reflections, terminal, wait_for


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a folder on a disk of its own of so many kB; again with another size, the same disk."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def sized(kilobytes: int) -> Path:
        option = f"size={kilobytes}k"
        mounted = os.path.ismount(disk)
        command = (
            ["mount", "-o", f"remount,{option}", disk] if mounted else ["mount", "-t", "tmpfs", "-o", option, "t", disk]
        )
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk of a given size can be made here: {done.stderr.strip()}")
        return disk

    yield sized
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", disk], check=True)


def last_lines(directory: Path) -> str:
    text = terminal(directory)
    assert "Traceback" not in text, text
    assert "Logging error" not in text, text
    return text


# from the first file on to those of batches
@pytest.mark.parametrize("kilobytes", [40, 500])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    stills, undisturbed, small_disk, tmp_path, kilobytes
):
    directory = small_disk(kilobytes) / "run"
    log = {"log": tmp_path / "terminal.log"}
    assert stills.run(directory, nproc=1, **log) == 1
    text = log["log"].read_text()
    assert "cannot be written: No space left on device" in text
    assert "Traceback" not in text, text
    assert "Logging error" not in text, text
    if kilobytes == 500:
        assert journalled(directory) > 1000
    small_disk(50_000)
    assert stills.run(directory, nproc=1, **log) == 0
    assert reflections(directory) == undisturbed


def test_a_full_disk_is_named_when_the_refined_geometry_is_written(stills, small_disk, tmp_path):
    directory = small_disk(100) / "run"
    log = tmp_path / "terminal.log"
    assert stills.run(directory, "reference_geometry=None", nproc=1, log=log) == 1
    text = log.read_text()
    assert "refined.refl cannot be written: No space left on device" in text
    assert "Traceback" not in text, text
    assert not list((directory / "geometry_refinement").glob("*refined*"))


def test_a_folder_that_loses_its_permission_is_named(stills, undisturbed, tmp_path):
    # permissions do not hold for root, but for root without these capabilities they do
    bounded = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    launcher = bounded if os.geteuid() == 0 else []
    if launcher and shutil.which("setpriv") is None:
        pytest.skip("permissions do not hold for root, and there is no setpriv")
    directory = tmp_path / "run"
    process = stills.start(directory, launcher=launcher)
    try:
        wait_for(lambda: journalled(directory) > 1000, process)
        change(directory, 0o555)
        assert process.wait(timeout=120) == 1
    finally:
        change(directory, 0o755)
        kill_all(process)
    assert "cannot be written: Permission denied" in last_lines(directory)
    assert journalled(directory) > 1000
    assert stills.run(directory) == 0
    assert reflections(directory) == undisturbed


def change(directory: Path, mode: int) -> None:
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        folder.chmod(mode)
