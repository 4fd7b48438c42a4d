"""The geometry refined with all crystals of a run, from the files of its batches."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from dxtbx.model import ExperimentList
from fake_ranks import on_fake_ranks
from panel_stills import detector, misplacements, stills

from ssx_mpi.command_line.process import read_arguments
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.final_geometry import check_final, refine_final_geometry
from ssx_mpi.records.batch_files import batches
from ssx_mpi.stages.packing import pack
from ssx_mpi.stages.still_results import identify


@pytest.fixture
def parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.h5").write_text("")
    known = ("image=x.h5", "space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90", "output.directory=run")
    return lambda *arguments: read_arguments([*known, *arguments])[0]


def made_run(parameters, experiments, reflections, batch_size: int):
    """A run whose batches are done; the second of them has no lattice."""
    n = len(experiments)
    made = batches(parameters.directory, n + batch_size, batch_size)
    first = 0
    for batch in made:
        batch.folder.mkdir(parents=True, exist_ok=True)
        if batch.number == 2:
            continue
        chosen = range(first, min(first + batch_size, n))
        first = chosen.stop
        table = reflections.select((reflections["id"] >= chosen.start) & (reflections["id"] < chosen.stop))
        own = ExperimentList([experiments[k] for k in chosen])
        table["id"] -= chosen.start
        identify(table, own.identifiers())
        (batch.folder / "indexed.expt").write_text(json.dumps(pack(own)))
        table.as_file(str(batch.folder / "indexed.refl"))
        numbers = [{"image": batch.first + k - chosen.start, "lattices": [{}]} for k in chosen]
        (batch.folder / "images.json").write_text(json.dumps(numbers))
    return SimpleNamespace(directory=parameters.directory, batches=made, parameters=parameters)


def test_all_crystals_of_all_batches_refine_the_geometry(parse, caplog):
    experiments, reflections = stills(detector(misplacements(1)), 24, seed=2)
    parameters = parse("final=True", "hierarchy_level=2")
    run = made_run(parameters, experiments, reflections, 7)
    header, beam = experiments[0].detector, experiments[0].beam
    outcome = parameters.directory / "geometry_refinement"
    results = []
    with caplog.at_level(logging.INFO, "ssx_mpi"):
        for size in (1, 2, 6):
            on_fake_ranks(size, lambda comm: refine_final_geometry(comm, run, (header, beam)))
            results.append({path.name: path.read_bytes() for path in outcome.iterdir()})
            (outcome / "final.expt").unlink()
    assert results[0] == results[1] == results[2]
    numbers = json.loads(results[0]["final_geometry.json"])
    assert numbers["hierarchy_level"] == 2 and numbers["closer"][0] > 1
    assert numbers["movement"][0] > 0.5
    assert len(json.loads(results[0]["final.expt"])["experiment"]) == 24
    # the command that the log names integrates with this geometry, elsewhere
    said = caplog.messages[-1]
    assert "Integrating again would gain; the command:\n" in said
    proposed = shlex.split(said.splitlines()[-1])
    assert f"reference_geometry={outcome / 'final.expt'}" in proposed
    assert f"output.directory={parameters.directory}_final" in proposed
    assert {"space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90"} <= set(proposed)


def test_done_once_and_said_again(parse, caplog):
    experiments, reflections = stills(detector(), 12, seed=3)
    run = made_run(parse("final=True", "hierarchy_level=0"), experiments, reflections, 12)
    geometry = experiments[0].detector, experiments[0].beam
    with caplog.at_level(logging.INFO, "ssx_mpi"):
        on_fake_ranks(2, lambda comm: refine_final_geometry(comm, run, geometry))
        assert caplog.messages[-1].endswith("Integrating again would gain little")
        path = run.directory / "geometry_refinement" / "final.expt"
        before, last = path.stat().st_mtime_ns, caplog.messages[-1]
        on_fake_ranks(2, lambda comm: refine_final_geometry(comm, run, geometry))
    assert path.stat().st_mtime_ns == before and caplog.messages[-1] == last


def test_a_damaged_file_is_named(parse):
    experiments, reflections = stills(detector(), 6, seed=4)
    run = made_run(parse("final=True"), experiments, reflections, 6)
    (run.batches[0].folder / "indexed.refl").write_bytes(b"no table")
    geometry = experiments[0].detector, experiments[0].beam
    with pytest.raises(InputError, match=r"batch_1/indexed\.expt and \.refl cannot be read"):
        on_fake_ranks(2, lambda comm: refine_final_geometry(comm, run, geometry))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("steps=find_spots", "steps= has no index"),
        ("keep_intermediate=False", "keep_intermediate=True"),
        ("engine=dials", "dials.refine"),
    ],
)
def test_what_cannot_be_is_refused_at_once(parse, given, reason):
    with pytest.raises(InputError, match=reason):
        check_final(parse("final=True", given))
    check_final(parse("final=False", given))
    check_final(parse("final=True"))


def test_all_crystals_may_be_asked_for(parse):
    assert parse("geometry_refinement.n_crystals=all").geometry.wanted == "all"
    assert parse("geometry_refinement.n_crystals=100000").geometry.n_crystals == 100_000
    for wrong in ("0", "-5", "1.5", "some", "1e3", "Auto"):
        with pytest.raises(InputError, match=r"geometry_refinement\.n_crystals"):
            parse(f"geometry_refinement.n_crystals={wrong}")
