"""Real stills: thaumatin from images to integrated data, nitrite reductase from its spots to lattices."""

from __future__ import annotations

import bz2
import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support import run, ssx_mpi

from ssx_mpi.command_line.process import read_arguments
from ssx_mpi.parameters.dials_parameters import dials_parameters
from ssx_mpi.stages.engines import build_engine

THAUMATIN = ("space_group=P41212", "unit_cell=57.8,57.8,150.2,90,90,90", "max_lattices=1")


@pytest.fixture(scope="module")
def thaumatin(real_data, tmp_path_factory):
    """Unpacks these images of the grid scan, and returns their folder."""
    folder = tmp_path_factory.mktemp("thaumatin")

    def unpack(*numbers: int) -> Path:
        for number in numbers:
            packed = real_data / "thaumatin_grid" / f"thau_3_2_{number:04d}.cbf.bz2"
            if not (folder / packed.stem).exists():
                (folder / packed.stem).write_bytes(bz2.decompress(packed.read_bytes()))
        return folder

    return unpack


@pytest.fixture(scope="module")
def geometry(real_data) -> str:
    """The geometry that DIALS 3.30 refined with all images."""
    return f"reference_geometry={real_data / 'thaumatin_dials_3_30' / 'geometry.expt'}"


def tables(folder: Path, name: str):
    from dials.array_family import flex
    from dxtbx.model.experiment_list import ExperimentListFactory

    experiments = ExperimentListFactory.from_json_file(str(folder / f"{name}.expt"), check_format=False)
    return experiments, flex.reflection_table.from_file(str(folder / f"{name}.refl"))


def test_thaumatin_is_integrated_and_a_blank_is_a_blank(thaumatin, geometry, real_data, tmp_path):
    folder = thaumatin(11, 14, 16)
    images = [f"image={folder}/thau_3_2_{n:04d}.cbf" for n in (11, 14, 16)]
    job = ssx_mpi(*images, *THAUMATIN, geometry, f"output.directory={tmp_path}/out")
    assert job.status == 0, job.text
    counts = json.loads((tmp_path / "out" / "ssx_mpi.json").read_text())["total"]["counts"]
    assert (counts["images"], counts["hits"], counts["indexed"], counts["crystals"]) == (3, 2, 2, 2)
    experiments, reflections = tables(tmp_path / "out" / "batch_1", "integrated_1")
    theirs = np.load(real_data / "thaumatin_dials_3_30" / "integrated.npz")
    for k, (experiment, number) in enumerate(zip(experiments, (11, 14))):
        # 57.8 57.8 150.5 is what DIALS 3.30 finds with this geometry
        assert experiment.crystal.get_unit_cell().parameters()[:3] == pytest.approx((57.8, 57.8, 150.5), rel=0.005)
        own = reflections.select(reflections["id"] == k)
        same = theirs["image"] == number
        assert 0.7 < len(own) / same.sum() < 1.4


DIALS_PROGRAMS = """
import sys
from ssx_mpi import dials_compat
dials_compat.prepare()
from dials.command_line import find_spots, ssx_index, ssx_integrate
from dxtbx.model import ExperimentList
from ssx_mpi.parameters.run_parameters import Source
from ssx_mpi.images.experiment_maker import ExperimentMaker, read_geometry
from ssx_mpi.images.sources import find_images
image, geometry, d_min = sys.argv[1:]
# dials.import 3.12 with this reference geometry makes a sequence of a still, which it cannot read then
maker = ExperimentMaker(find_images((Source("image", image),)), read_geometry(geometry))
ExperimentList([maker.experiment(0)]).as_file("imported.expt")
find_spots.run(["imported.expt", "nproc=1", "min_spot_size=3", "max_spot_size=20", f"filter.d_min={d_min}"])
ssx_index.run(["imported.expt", "strong.refl", "nproc=1", "max_lattices=1", "space_group=P41212",
               "unit_cell=57.8,57.8,150.2,90,90,90"])
ssx_integrate.run(["indexed.expt", "indexed.refl", "nproc=1", "algorithm=ellipsoid", f"prediction.d_min={d_min}",
                   "rlp_mosaicity.model=simple6"])
"""


def test_dials_engine_gives_what_the_programs_of_dials_give(thaumatin, geometry, tmp_path):
    # low resolution: fewer reflections to integrate, by the same code
    d_min = "2.6"
    image = f"{thaumatin(14)}/thau_3_2_0014.cbf"
    job = ssx_mpi(
        f"image={image}", *THAUMATIN, geometry, "engine=dials", f"d_min={d_min}", f"output.directory={tmp_path}/out"
    )
    assert job.status == 0, job.text
    (tmp_path / "dials").mkdir()
    reference = geometry.split("=")[1]
    done = run([sys.executable, "-c", DIALS_PROGRAMS, image, reference, d_min], 300, tmp_path / "dials")
    assert done.status == 0, done.text
    batch = tmp_path / "out" / "batch_1"
    for ours, theirs in (("indexed", "indexed"), ("integrated_1", "integrated_1")):
        (one, table), (other, reflections) = tables(batch, ours), tables(tmp_path / "dials", theirs)
        assert len(one) == len(other) == 1
        assert one[0].crystal.get_A() == pytest.approx(other[0].crystal.get_A(), rel=1e-9)
        assert len(table) == len(reflections)
        assert list(table["miller_index"]) == list(reflections["miller_index"])
        for name in ("xyzcal.px", "xyzobs.px.value", "intensity.sum.value", "intensity.sum.variance"):
            assert np.allclose(np.asarray(list(table[name])), np.asarray(list(reflections[name])), rtol=1e-6), name
        assert table.are_experiment_identifiers_consistent(one)


@pytest.fixture(scope="module")
def nitrite_reductase(real_data):
    """Experiments of five stills with their strong spots."""
    from dials.array_family import flex
    from dxtbx.model.experiment_list import ExperimentListFactory

    folder = real_data / "cunir_serial_processed"
    experiments = ExperimentListFactory.from_json_file(str(folder / "imported_with_ref_5.expt"), check_format=False)
    strong = flex.reflection_table.from_file(str(folder / "strong_5.refl"))
    return list(zip(experiments, strong.split_by_experiment_id()))


def indexer(engine: str, a: float = 96.4, symmetry: str = "space_group=P213"):
    arguments = ["image=x.cbf", f"engine={engine}", symmetry, f"unit_cell={a},{a},{a},90,90,90"]
    parameters = read_arguments([*arguments, "max_lattices=2"])[0]
    return build_engine(parameters, dials_parameters(parameters, {})).indexer.index


def lattices(engine: str, stills) -> list[list]:
    """Crystals found on each still."""
    index = indexer(engine)
    found = (index(copy.deepcopy(experiment), copy.deepcopy(strong)) for experiment, strong in stills)
    return [[e.crystal for e in crystals.experiments] for crystals in found]


def misorientation(one, other) -> float:
    """Degrees between two crystals as lattices: which way round they are indexed does not matter."""
    from ssx_mpi.simulation.truth import lattice_rotations, misorientation_deg

    rotations = lattice_rotations(one.get_unit_cell(), one.get_space_group())
    return misorientation_deg(*(np.reshape(c.get_A(), (3, 3)) for c in (one, other)), rotations)


def test_nitrite_reductase_is_indexed_from_its_spots(nitrite_reductase):
    found = lattices("fast", nitrite_reductase)
    assert all(found)
    assert sum(map(len, found)) >= 5
    for crystal in (c for own in found for c in own):
        assert crystal.get_unit_cell().parameters()[:3] == pytest.approx((96.4,) * 3, rel=0.005)
    for own in found:
        assert all(misorientation(own[0], other) > 2 for other in own[1:]), "the same lattice twice"


def test_second_lattices_are_there_and_not_in_spots_without_order(nitrite_reductase):
    """The spots that the first lattice leaves, turned about the beam each by an angle of its own, make none."""
    from dxtbx import flumpy

    index, rng = indexer("fast"), np.random.default_rng(1)
    for experiment, strong in nitrite_reductase[:4]:
        found = index(copy.deepcopy(experiment), copy.deepcopy(strong))
        assert len(found.experiments) == 2
        first = found.reflections.select(found.reflections["id"] == 0)["xyzobs.px.value"]
        taken = {place[:2] for place in first}
        xyz = np.array(list(strong["xyzobs.px.value"]))
        free = np.array([place[:2] not in taken for place in strong["xyzobs.px.value"]])
        centre = np.array(experiment.detector[0].get_beam_centre_px(experiment.beam.get_s0()))
        radius = np.hypot(*(xyz[free, :2] - centre).T)
        angle = rng.uniform(0, 2 * np.pi, free.sum())
        xyz[free, :2] = centre + radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        shuffled = copy.deepcopy(strong)
        shuffled["xyzobs.px.value"] = flumpy.vec_from_numpy(xyz)
        assert len(index(copy.deepcopy(experiment), shuffled).experiments) == 1


def test_second_lattices_are_cubic_when_nothing_makes_them_and_have_no_other_cell(nitrite_reductase):
    """DIALS does not find them; chance would know neither the right angles nor the one length among wrong ones."""
    from dials.array_family import flex

    free_cell = indexer("fast", symmetry="space_group=None")
    for experiment, strong in nitrite_reductase[:3]:
        found = free_cell(copy.deepcopy(experiment), copy.deepcopy(strong))
        assert len(found.experiments) == 2
        lengths, angles = np.split(np.array(found.experiments[1].crystal.get_unit_cell().parameters()), 2)
        # axes and angles are refined each on its own, from a search that takes them within 10% and 5 degrees; the first
        # lattices, of which there is no doubt, differ from a cube by 0.3% and 0.12 degrees
        assert np.ptp(lengths) < 0.003 * 96.4
        assert np.abs(angles - 90).max() < 0.2
    experiment, strong = nitrite_reductase[0]
    first = indexer("fast")(copy.deepcopy(experiment), copy.deepcopy(strong)).reflections
    first = first.select(first["id"] == 0)
    taken = {place[:2] for place in first["xyzobs.px.value"]}
    free = strong.select(flex.bool([place[:2] not in taken for place in strong["xyzobs.px.value"]]))
    assert len(indexer("fast")(copy.deepcopy(experiment), copy.deepcopy(free)).experiments) >= 1
    for factor in (0.9, 0.93, 1.06, 1.1):
        found = indexer("fast", 96.4 * factor)(copy.deepcopy(experiment), copy.deepcopy(free))
        assert len(found.experiments) == 0


def test_both_engines_find_the_same_lattice(nitrite_reductase):
    # the fifth has few spots, nearly all of one lattice
    stills = nitrite_reductase[4:]
    (fast,), (dials,) = lattices("fast", stills), lattices("dials", stills)
    assert len(fast) == len(dials) == 1
    assert misorientation(fast[0], dials[0]) < 0.05
