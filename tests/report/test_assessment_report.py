"""The command that follows an assessment can be pasted into a shell and means what was found."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from ssx_mpi.command_line.process import read_arguments
from ssx_mpi.report import assessment_report as report
from ssx_mpi.stages.cell_assessment import Assessment, CellCluster


@pytest.fixture
def assessed() -> Assessment:
    """Three tetragonal crystals, and a stray one."""
    cells = np.array([[38.2, 79.0, 79.1, 90, 90, 90]] * 3 + [[50.0, 60, 70, 90, 100, 90]])
    best = CellCluster((0, 1, 2), tuple(cells[0]), (0.0,) * 6, "P 4 2 2", (79.05, 79.05, 38.2, 90, 90, 90))
    stray = CellCluster((3,), tuple(cells[3]), (0.0,) * 6, "P 1 2 1", (50, 60, 70, 90, 100, 90))
    return Assessment((best, stray), cells)


def test_the_table_has_the_most_populous_first(assessed):
    lines = report.table(assessed).splitlines()
    assert "3 (75.0%)" in lines[3]
    assert "79.05, 79.05, 38.20" in lines[3]
    assert "P 4 2 2" in lines[3]
    assert "1 (25.0%)" in lines[4]


@pytest.fixture
def parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a b.h5", "bad.mask", "spots.phil", "geo.expt", "import.phil", "m.mtz"):
        Path(name).write_text("")
    return lambda *arguments: read_arguments(list(arguments))[0]


def test_the_next_command_reads_as_the_same_run_with_the_cell(assessed, parse):
    asked = parse(
        *("image=a b.h5:3:9", "template=x_##.cbf", "mask=bad.mask", "d_min=1.8", "max_lattices=2", "min_spots=15"),
        *("spotfinding.phil=spots.phil", "dials_import.phil=import.phil", "starting_geometry=geo.expt"),
        *("spotfinding.min_spot_size=2", "batch_size=100", "engine=dials", "output.directory=o p"),
        *("keep_intermediate=False", "geometry_refinement.n_crystals=40", "geometry_refinement.images_to_use=2:30"),
        *("hierarchy_level=1", "panel_shift=0.2", "panel_tilt=0.3"),
        *("beam_search=False", "restrain_cell=True", "integration.algorithm=stills", "d_max=30"),
        *(
            "live_merge=True",
            "anomalous=True",
            "reduction.d_min=2.5",
            "filtering.method=deltacchalf",
            "reference=m.mtz",
        ),
        *("central_unit_cell=79,79,38,90,90,90", "reduction.steps=scale"),
    )
    words = shlex.split(report.next_command(assessed, asked))
    assert words[0] == "ssx_mpi"
    proposed = parse(*words[1:])
    assert proposed.unit_cell == (79.05, 79.05, 38.2, 90, 90, 90)
    assert proposed.space_group == "P 4 2 2"
    assert proposed.restart
    changed = {"unit_cell", "space_group"}
    before, after = asked.identity(), proposed.identity()
    # what is typed differs as well
    assert {name for name in before if before[name] != after[name]} == changed | {"typed"}
    assert proposed.directory == asked.directory
    assert (proposed.reduction, proposed.live_merge) == (asked.reduction, True)


def test_a_space_group_that_was_given_stays(assessed, parse):
    words = shlex.split(report.next_command(assessed, parse("image=a b.h5", "space_group=P43212")))
    assert parse(*words[1:]).space_group == "P 43 21 2"


def test_json_has_what_the_table_has(assessed):
    content = json.loads(json.dumps(report.as_json(assessed, "ssx_mpi x")))
    assert content["n_crystals"] == 4
    assert [c["share"] for c in content["clusters"]] == [0.75, 0.25]
    assert content["clusters"][0]["median_cell"] == [79.05, 79.05, 38.2, 90, 90, 90]
    assert content["next_command"] == "ssx_mpi x"


def test_the_plot_is_an_image(assessed, tmp_path):
    report.plot(assessed, tmp_path / "cells.png")
    assert (tmp_path / "cells.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
