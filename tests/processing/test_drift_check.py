"""A detector that moves along a run is found from the files of its batches, and one that does not is not."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from dxtbx.model import ExperimentList
from fake_ranks import on_fake_ranks
from panel_stills import detector, stills

from ssx_mpi.processing.drift_check import look_for_drift
from ssx_mpi.records.batch_files import batches
from ssx_mpi.stages.packing import pack
from ssx_mpi.stages.still_results import identify

N_IMAGES, BATCH = 72, 30


def made_run(folder, experiments, reflections, **parameters):
    """A run whose batches are done; every other image has a crystal."""
    made = batches(folder, N_IMAGES, BATCH)
    for batch in made:
        batch.folder.mkdir(parents=True)
        own = [k for k in range(len(experiments)) if batch.first <= 2 * k < batch.stop]
        chosen = (reflections["id"] >= own[0]) & (reflections["id"] <= own[-1])
        table = reflections.select(chosen)
        table["id"] -= own[0]
        crystals = ExperimentList([experiments[k] for k in own])
        identify(table, crystals.identifiers())
        (batch.folder / "indexed.expt").write_text(json.dumps(pack(crystals)))
        table.as_file(str(batch.folder / "indexed.refl"))
        numbers = [{"image": k, "lattices": [{}] * (k % 2 == 0)} for k in range(batch.first, batch.stop)]
        (batch.folder / "images.json").write_text(json.dumps(numbers))
    known = SimpleNamespace(image_steps=("find_spots", "index"), keep_intermediate=True, **parameters)
    return SimpleNamespace(directory=folder, batches=made, parameters=known, images=range(N_IMAGES))


def moved_stills(seed: int, drift: np.ndarray):
    """Crystals seen on a detector that goes along `drift` (mm in the laboratory) in all, evenly."""
    from dials.array_family import flex

    n = N_IMAGES // 2
    everything, table = ExperimentList(), flex.reflection_table()
    for k in range(n):
        true = detector()
        x, y, z = drift * (k / (n - 1) - 0.5)
        true.hierarchy().set_local_frame((1, 0, 0), (0, -1, 0), (float(x), float(y), float(z) - 100.0))
        experiments, reflections = stills(true, 1, seed=1000 * seed + k)
        experiments[0].identifier = f"crystal-{k}"
        identify(reflections, [])
        reflections["id"] = flex.int(len(reflections), k)
        everything.append(experiments[0])
        table.extend(reflections)
    # all on the detector of the header
    for experiment in everything:
        experiment.detector = everything[0].detector
    return everything, table


def test_a_detector_that_moves_is_found_on_any_number_of_ranks(tmp_path, caplog):
    experiments, reflections = moved_stills(1, np.array([0.06, 0.0, 0.0]))
    geometry = experiments[0].detector, experiments[0].beam
    found = []
    for size in (1, 2, 4):
        run = made_run(tmp_path / str(size), experiments, reflections)
        with caplog.at_level(logging.WARNING, "ssx_mpi"):
            on_fake_ranks(size, lambda comm, run=run: look_for_drift(comm, run, geometry))
        found.append((run.directory / "geometry_refinement" / "drift.json").read_text())
    assert found[0] == found[1] == found[2]
    content = json.loads(found[0])
    total = np.array(content["shift"][-1]) - content["shift"][0]
    # to 3.5 of its standard deviations
    assert total[0] == pytest.approx(0.06 * 72 / 70, abs=0.0025) and abs(total[1]) < 0.0025
    said = caplog.messages[0]
    assert "moved along the run, evenly: +0.06" in said and "mm along its fast axis from image 1 to 72" in said
    # said again by the next start, from the file
    with caplog.at_level(logging.WARNING, "ssx_mpi"):
        on_fake_ranks(1, lambda comm: look_for_drift(comm, run, geometry))
    assert caplog.messages[-1] == said


def test_one_that_stays_is_not(tmp_path, caplog):
    for seed in range(3):
        experiments, reflections = stills(detector(), N_IMAGES // 2, seed=seed)
        run = made_run(tmp_path / str(seed), experiments, reflections)
        geometry = experiments[0].detector, experiments[0].beam
        on_fake_ranks(2, lambda comm, run=run, geometry=geometry: look_for_drift(comm, run, geometry))
        assert json.loads((run.directory / "geometry_refinement" / "drift.json").read_text()) == {}
    assert not caplog.messages


def test_what_is_not_kept_is_not_looked_at(tmp_path):
    run = SimpleNamespace(
        directory=tmp_path,
        images=range(3),
        parameters=SimpleNamespace(image_steps=("find_spots", "index", "integrate"), keep_intermediate=False),
    )
    on_fake_ranks(1, lambda comm: look_for_drift(comm, run, (None, None)))
    assert not list(tmp_path.iterdir())
