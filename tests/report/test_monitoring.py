"""What a monitor tells of a run, from what lies in its folder."""

from __future__ import annotations

import io
import json
import time

import h5py
import numpy as np
import pytest
from test_text import statistics

from ssx_mpi.command_line import monitor as program
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.report.monitoring import RunStatus, bars, find_runs, plain, screen
from ssx_mpi.report.run_report import LiveReport


def log(folder, *lines: str) -> None:
    stamp = "2026-11-26 20:00:00,123"
    (folder / "ssx_mpi.log").write_text("".join(f"{stamp} {line}\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    """A run of 20 images with a batch of ten done, and three images more."""
    live = LiveReport(tmp_path, 20, 2, True, {"n_batches": 2, "program": "ssx_mpi x"})
    live.start(0)
    for k in range(13):
        live.count(k < 6, k < 5, int(k < 4))
        if k == 9:
            live.show(10)
            live.hear(1, statistics(10, 4), [])
    live._last_word = 0.0
    live.show(13)
    log(tmp_path, "INFO 20 images from 1 source", "WARNING x_3.cbf left out", "INFO Batch 1 of 2")
    return tmp_path


def test_numbers_are_those_of_the_images_so_far_not_of_the_finished_batches(folder):
    status = RunStatus.read(folder)
    assert (status.state, status.n_images, status.done) == ("running", 20, 13)
    assert (status.hits, status.indexed, status.crystals) == (6, 5, 4)
    assert status.ranks == 2 and status.images_per_second > 0 and status.seconds_left >= 0
    assert status.cell is not None and status.warnings == ["x_3.cbf left out"]
    assert status.doing == "Batch 1 of 2"


def test_a_run_that_says_nothing_any_more_is_silent(folder):
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps(progress | {"time": time.time() - 600}))
    assert RunStatus.read(folder).state == "silent"


def test_before_the_first_image_the_log_tells(tmp_path):
    log(tmp_path, "INFO 20 images", "INFO looking for first crystals")
    status = RunStatus.read(tmp_path)
    assert (status.state, status.doing) == ("starting", "looking for first crystals")
    assert "looking for first crystals" in plain([status])


def test_damaged_and_half_written_files_do_no_harm(folder):
    for name in ("ssx_mpi.json", "images.h5"):
        (folder / name).write_bytes(b"{")
    assert RunStatus.read(folder).done == 13


def test_hits_along_the_run_come_from_finished_images(folder):
    with h5py.File(folder / "images.h5", "w") as file:
        file["images/finished"] = np.repeat([1, 0], [80, 20]).astype(np.uint8)
        file["images/hit"] = np.repeat([1, 0, 1], [40, 40, 20]).astype(np.uint8)
    assert RunStatus.read(folder).hit_rate == [1.0, 1.0, 0.0, 0.0]
    assert bars([1.0, 0.5, 0.0]) == "█▄ "


def test_several_runs_are_found_and_have_a_line_each(folder, capsys):
    other = folder.parent / "evening" / "second"
    other.mkdir(parents=True)
    log(other, "INFO 5 images")
    assert program.main(["--watch", str(folder), str(other.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [folder.name, "second"]
    assert find_runs(other.parent) == [other]


def test_json_is_for_programs(folder, capsys):
    assert program.main(["--json", str(folder)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["done"], found["state"]) == (13, "running")


@pytest.mark.parametrize("several", [False, True])
def test_the_full_screen_has_the_same_numbers(folder, several):
    from rich.console import Console

    console = Console(width=100, height=40, record=True, file=io.StringIO())
    statuses = [RunStatus.read(folder)] * (2 if several else 1)
    console.print(screen(statuses))
    text = console.export_text()
    assert ("13 (65.0%) of 20" in text) or (several and "65%" in text)
    assert "running" in text


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="no run has written here"):
        RunStatus.read(tmp_path)
    assert program.main([str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
