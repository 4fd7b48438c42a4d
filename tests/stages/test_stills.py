"""One still from image to crystals: a bad image is a failure with a name and a reason, never an exception."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dials.array_family import flex
from dxtbx.model import ExperimentList
from small_chips import small_chip

from ssx_mpi.command_line.process import read_arguments
from ssx_mpi.images.experiment_maker import ExperimentMaker
from ssx_mpi.images.sources import find_images
from ssx_mpi.parameters.dials_parameters import dials_parameters
from ssx_mpi.parameters.run_parameters import Source
from ssx_mpi.records.journal import decode
from ssx_mpi.stages.engines import build_engine
from ssx_mpi.stages.protocols import Engine
from ssx_mpi.stages.still_results import Crystals, Failure, IntegratedLattices
from ssx_mpi.stages.stills import StillProcessor


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folder of five CBF images; the first and the last two have a crystal."""
    folder = tmp_path_factory.mktemp("cbf")
    small_chip(folder / "x_#.cbf", n_images=5, seed=1, hit_rate=0.5)
    return folder


@pytest.fixture
def images(made, tmp_path) -> Path:
    """A copy of them to do harm to."""
    return shutil.copytree(made, tmp_path / "images")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Both engines, for lysozyme."""
    cell = ("space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90", "max_lattices=1", "image=x.cbf")
    built = {}
    for name in ("fast", "dials"):
        parameters = read_arguments([*cell, f"engine={name}"])[0]
        built[name] = build_engine(parameters, dials_parameters(parameters, {}))
    return built


def processor(folder: Path, engine: Engine, min_spots: int = 10) -> StillProcessor:
    maker = ExperimentMaker(find_images((Source("template", f"{folder}/x_#.cbf"),)))
    return StillProcessor(maker, engine, min_spots)


def harm(path: Path, how: str) -> None:
    content = path.read_bytes()
    start = content.index(bytes.fromhex("0c1a04d5"))
    if how == "truncated":
        path.write_bytes(content[: start + 40_000])
    elif how == "header only":
        path.write_bytes(content[: start - 200])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("###CBF: nothing that follows makes sense\n" * 20)
    elif how == "missing":
        path.unlink()
    elif how == "misshapen":
        for name, n in (("Fastest", 487), ("Second", 407)):
            old = b"X-Binary-Size-%s-Dimension: %d" % (name.encode(), n)
            assert old in content
            content = content.replace(old, b"X-Binary-Size-%s-Dimension: %d" % (name.encode(), n - 1))
        path.write_bytes(
            content.replace(b"X-Binary-Number-of-Elements: 198209", b"X-Binary-Number-of-Elements: 197316")
        )


@pytest.mark.parametrize("engine", ["fast", "dials"])
@pytest.mark.parametrize("how", ["truncated", "header only", "empty", "text", "missing", "misshapen"])
def test_a_bad_image_is_counted_named_and_left_out(images, engines, engine, how):
    work = processor(images, engines[engine])
    harm(images / "x_3.cbf", how)
    good, bad = work.find_spots(3), work.find_spots(2)
    again = work.find_spots(3)
    bad = work.integrate(work.index(bad))
    assert [f.stage for f in bad.failures] == ["read"]
    assert bad.failures[0].reason
    assert str(images) not in bad.failures[0].reason
    assert not bad.hit
    numbers = work.describe(bad)
    assert numbers["name"] == "x_3.cbf"
    assert numbers["failures"] == [["read", bad.failures[0].reason]]
    # and those before and after it are what they were
    assert (good.failures, again.failures) == ((), ())
    assert good.spots.n_spots == again.spots.n_spots > 100


def test_the_same_fault_has_the_same_reason(images, engines):
    work = processor(images, engines["fast"])
    for name in ("x_1.cbf", "x_5.cbf"):
        harm(images / name, "truncated")
    first, last = work.find_spots(0), work.find_spots(4)
    assert first.failures == last.failures


def test_a_hit_becomes_a_crystal_and_a_blank_does_not(made, engines):
    work = processor(made, engines["fast"])
    found = []
    for image in range(5):
        result = work.integrate(work.index(work.find_spots(image)))
        assert not result.failures
        found.append((result.hit, result.n_lattices, result.n_crystals))
        assert (result.spots.n_spots >= 10) == result.hit
        assert set(result.seconds) >= {"find_spots"}
        if result.n_crystals:
            lattice, crystal = result.indexed.lattices[0], result.integrated.numbers[0]
            assert lattice.n_indexed > 50
            assert np.hypot(lattice.rmsd_x, lattice.rmsd_y) < 0.3
            assert crystal.cell[:3] == pytest.approx((79.1, 79.1, 38.2), rel=0.01)
            assert crystal.n_reflections > 100
    assert found.count((True, 1, 1)) == 3
    assert found.count((False, 0, 0)) == 2


def test_min_spots_decides_what_a_hit_is(made, engines):
    hit = processor(made, engines["fast"]).find_spots(3)
    assert processor(made, engines["fast"], min_spots=hit.spots.n_spots).find_spots(3).hit
    assert not processor(made, engines["fast"], min_spots=hit.spots.n_spots + 1).find_spots(3).hit


def test_both_engines_find_the_same_spots(made, engines):
    fast, dials = (processor(made, engines[name]).find_spots(3).spots.table for name in ("fast", "dials"))
    assert len(fast) == len(dials)
    for name in ("bbox", "intensity.sum.value", "xyzobs.px.value"):
        assert np.allclose(np.asarray(list(fast[name])), np.asarray(list(dials[name]))), name


def test_the_record_has_all_that_the_files_need(made, engines):
    work = processor(made, engines["fast"])
    result = work.integrate(work.index(work.find_spots(3)))
    record = work.record(result, ("find_spots", "index", "integrate"), {})
    entry = decode(record)
    assert entry.image == 3
    assert set(entry.tables) == {"strong", "indexed", "integrated"}
    assert entry.tables["strong"].n_rows == result.spots.n_spots
    assert entry.tables["integrated"].identifiers == {0: work.maker.images.identifier(3, 0)}
    assert entry.content["numbers"]["crystals"][0]["n_reflections"] == result.integrated.numbers[0].n_reflections
    assert set(entry.content["experiments"]) == {"imported", "indexed", "integrated"}


def test_indexed_again_it_keeps_its_spots_and_forgets_old_failures(made, engines):
    work = processor(made, engines["fast"])
    result = work.find_spots(3).failed(Failure("index", "no lattice found"))
    again = work.index_again(result)
    assert again.failures == ()
    assert again.n_lattices == 1
    assert (again.spots.n_spots, again.spots.experiment) == (result.spots.n_spots, None)


class Failing:
    """Every stage of an engine, raising `error`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def find(self, experiment, frame):
        raise self.error

    index = integrate = find


class TestFailingStages:
    """Stages that fail as libraries do."""

    def work(self, made, engines, **changed) -> StillProcessor:
        return processor(made, replace(engines["fast"], **changed))

    def test_an_indexer_without_a_lattice(self, made, engines):
        class Nothing:
            def index(self, experiment, strong):
                return Crystals(ExperimentList(), flex.reflection_table())

        work = self.work(made, engines, indexer=Nothing())
        result = work.integrate(work.index(work.find_spots(3)))
        assert result.failures == (Failure("index", "no lattice found"),)
        assert result.hit
        assert not result.n_crystals

    def test_a_crystal_that_cannot_be_integrated(self, made, engines):
        class Refusing:
            def integrate(self, crystals, frame):
                return IntegratedLattices(ExperimentList(), flex.reflection_table(), (("0", "no background"),))

        work = self.work(made, engines, integrator=Refusing())
        result = work.integrate(work.index(work.find_spots(3)))
        assert result.failures == (Failure("integrate", "no background"),)
        assert isinstance(result.crystals, Crystals)

    @pytest.mark.parametrize("stage", ["find_spots", "index", "integrate"])
    @pytest.mark.parametrize("error", [RuntimeError("dxtbx Error: 12 of 13"), OSError("/data/x.cbf")])
    def test_what_libraries_raise_is_a_reason_without_numbers_and_paths(self, made, engines, stage, error):
        part = {"find_spots": "spot_finder", "index": "indexer", "integrate": "integrator"}[stage]
        work = self.work(made, engines, **{part: Failing(error)})
        first, second = (work.integrate(work.index(work.find_spots(image))) for image in (3, 4))
        (failure,) = first.failures
        assert failure.stage == stage
        assert failure.reason in ("dxtbx Error: # of #", "…")
        # the first of each reason alone has a traceback
        assert type(error).__name__ in failure.traceback
        assert (second.failures, second.failures[0].traceback) == (first.failures, "")

    def test_a_wrong_index_of_a_library_is_a_reason_and_one_of_ours_is_named_as_a_fault(self, made, engines):
        (theirs,) = self.work(made, engines, spot_finder=Failing(IndexError("12"))).find_spots(3).failures
        assert theirs.reason == "#"
        # a broken assumption in our own code: spots of no panel that the image has
        work = self.work(made, engines)
        still = work.index(work.find_spots(3))
        broken = replace(still, spots=replace(still.spots, frame=replace(still.spots.frame, data=(), masks=())))
        (ours,) = work.integrate(broken).failures
        assert ours.stage == "integrate"
        assert ours.reason.startswith("fault in the program (IndexError at ssx_mpi.")

    @pytest.mark.parametrize("error", [TypeError("a fault"), NameError("a fault"), MemoryError()])
    def test_faults_of_the_program_end_it(self, made, engines, error):
        with pytest.raises(type(error)):
            self.work(made, engines, spot_finder=Failing(error)).find_spots(3)
