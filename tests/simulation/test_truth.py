"""Comparison with the truth: right, reindexed, wrong and missing lattices, geometry, merging; and a run of DIALS."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ssx_mpi.command_line import compare as compare_program
from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.simulation import truth as module
from ssx_mpi.simulation.data_set import simulate
from ssx_mpi.simulation.simulation_parameters import CrystalParameters, HeaderParameters, SimulationParameters
from ssx_mpi.simulation.still_images import Simulator


@pytest.fixture(scope="module")
def lysozyme_rotations():
    from cctbx import sgtbx, uctbx

    cell = uctbx.unit_cell((79.1, 79.1, 38.2, 90, 90, 90))
    return module.lattice_rotations(cell, sgtbx.space_group_info("P43212").group())


@pytest.mark.parametrize(
    ("symbol", "cell", "number"),
    [
        ("P43212", (79.1, 79.1, 38.2, 90, 90, 90), 8),
        ("P213", (96, 96, 96, 90, 90, 90), 24),
        ("P6122", (50, 50, 70, 90, 90, 120), 12),
        ("C2", (60, 30, 40, 90, 105, 90), 2),
    ],
)
def test_lattices_have_the_rotations_of_their_holohedry(symbol, cell, number):
    from cctbx import sgtbx, uctbx

    rotations = module.lattice_rotations(uctbx.unit_cell(cell), sgtbx.space_group_info(symbol).group())
    assert len(rotations) == number
    # they leave the metric of the reciprocal lattice alone
    B = np.array(uctbx.unit_cell(cell).fractionalization_matrix()).reshape(3, 3).T
    metric = B.T @ B
    assert np.allclose(rotations.transpose(0, 2, 1) @ metric @ rotations, metric, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    angle=st.floats(0.001, 3.0),
    which=st.integers(0, 7),
)
def test_misorientation_is_the_angle_between_lattices_however_indexed(lysozyme_rotations, seed, angle, which):
    rng = np.random.default_rng(seed)
    A = Rotation.random(random_state=seed).as_matrix() @ np.diag([1 / 79.1, 1 / 79.1, 1 / 38.2])
    axis = rng.normal(size=3)
    turned = Rotation.from_rotvec(np.radians(angle) * axis / np.linalg.norm(axis)).as_matrix() @ A
    stretched = turned @ np.diag([1.002, 1.002, 0.999]) @ lysozyme_rotations[which]
    assert module.misorientation_deg(A, stretched, lysozyme_rotations) == pytest.approx(angle, abs=1e-4)


def test_left_handed_is_not_right(lysozyme_rotations):
    A = Rotation.random(random_state=1).as_matrix() @ np.diag([1 / 79.1, 1 / 79.1, 1 / 38.2])
    assert module.misorientation_deg(A, -A, lysozyme_rotations) == pytest.approx(180)


@pytest.fixture
def simulated(small, tmp_path):
    """A data set with two lattices on every image, its folder and truth."""
    simulate(small(n_images=3, hit_rate=1.0, lattices=(0.0, 1.0)), SerialCommunicator())
    return module.load_truth(tmp_path)


def test_lattices_are_counted_as_right_false_missing_or_double(simulated, lysozyme_rotations):
    turn = Rotation.from_rotvec(np.radians([0.0, 0.03, 0.0])).as_matrix()
    far = Rotation.from_rotvec(np.radians([0.0, 5.0, 0.0])).as_matrix()
    true = simulated.lattices
    assert [lattice.image for lattice in true] == [0, 0, 1, 1, 2, 2]
    run = [
        module.Lattice(0, turn @ true[0].A @ lysozyme_rotations[3]),
        module.Lattice(0, turn @ true[1].A),
        module.Lattice(0, true[1].A),
        module.Lattice(1, far @ true[2].A),
        module.Lattice(2, true[2].A),
    ]
    geometry = module.Geometry(
        tuple(np.add(simulated.geometry.beam_centre_mm, (0.03, -0.04))), simulated.geometry.distance_mm - 0.02
    )
    found = module.compare(simulated, run, geometry)
    assert (found.hits, found.hits_indexed) == (3, 1)
    assert (found.true_lattices, found.found_lattices) == (6, 2)
    assert (found.lattices, found.false_lattices, found.duplicate_lattices) == (5, 2, 1)
    assert found.orientation_error_deg == pytest.approx(0.03, abs=1e-6)
    assert found.beam_centre_error_mm == pytest.approx(0.05)
    assert found.distance_error_mm == pytest.approx(-0.02)
    assert np.isnan(found.cc_truth)


def test_merging_finds_scales_and_truth(simulated):
    """Counts made of true intensities, scales and shares merge back to the true intensities."""
    array = simulated.intensities
    rng = np.random.default_rng(1)
    n, n_crystals = 12_000, 30
    row = rng.integers(0, array.size(), n)
    operations = [op.r().as_double() for op in array.space_group().all_ops()]
    rotations = np.array(operations).reshape(-1, 3, 3)[rng.integers(0, len(operations), n)]
    hkl = np.einsum("ni,nij->nj", np.array(list(array.indices()))[row], rotations).astype(int)
    crystal = rng.integers(0, n_crystals, n)
    scale = np.exp(rng.normal(size=n_crystals))
    share = rng.uniform(0.3, 1.0, n)
    intensity = array.data().as_numpy_array()[row] * scale[crystal] * share
    observations = module.Observations(hkl, crystal, intensity, np.full(n, 1e-6), share)
    n_merged, unscaled, scaled, counting = module.merging_correlations(simulated, observations)
    assert n_merged == len(np.unique(row))
    assert scaled > 0.99
    assert unscaled < scaled - 0.02
    assert counting > 0.9999
    # with noise of a known variance and no other errors, the correlation is the one expected of that noise
    sigma = 0.5 * array.data().as_numpy_array().mean() * scale[crystal] * share
    noisy = module.Observations(hkl, crystal, intensity + sigma * rng.normal(size=n), sigma**2, share)
    *_, scaled, counting = module.merging_correlations(simulated, noisy)
    assert counting < 0.99
    assert scaled == pytest.approx(counting, abs=0.02)


@pytest.mark.parametrize("reindex", ["h,k,l", "-h,-k,l", "k,h,-l"])
def test_merged_intensities_are_compared_in_the_setting_that_fits(tmp_path, reindex):
    from cctbx import crystal, miller
    from cctbx.array_family import flex

    symmetry = crystal.symmetry(unit_cell=(50, 50, 70, 90, 90, 120), space_group_symbol="P3")
    indices = miller.build_set(symmetry, anomalous_flag=False, d_min=3.0)
    rng = np.random.default_rng(3)
    true = rng.exponential(100.0, indices.size())
    array = indices.array(data=flex.double(true)).set_observation_type_xray_intensity()
    # twice the scale, and errors half as large again as they are said to be
    measured = indices.array(
        data=flex.double(2 * true + rng.normal(0, 15, len(true))), sigmas=flex.double(len(true), 10)
    )
    half = measured.set_observation_type_xray_intensity().select(flex.bool(rng.random(len(true)) < 0.5))
    merged = half.change_basis(reindex).map_to_asu()
    dataset = merged.as_mtz_dataset("IMEAN")
    dataset.add_miller_array(merged.customized_copy(data=flex.int(merged.size(), 4), sigmas=None), "N")
    dataset.mtz_object().write(str(tmp_path / "merged.mtz"))
    truth = module.Truth((), (), module.Geometry((0.0, 0.0), 100.0), array)
    found = module.compare_merged(truth, tmp_path / "merged.mtz")
    assert (found.n_merged, found.multiplicity) == (half.size(), 4.0)
    assert found.cc_truth > 0.99
    assert found.deviation == pytest.approx(1.5, rel=0.1)


def test_observations_of_several_files_know_their_crystals(tmp_path):
    from dials.array_family import flex

    def write(name, rows):
        table = flex.reflection_table()
        ids, names, partialities = zip(*rows)
        n = len(rows)
        table["id"] = flex.int(ids)
        table["miller_index"] = flex.miller_index([(1, 2, k) for k in range(n)])
        table["partiality"] = flex.double(partialities)
        table["intensity.sum.value"] = flex.double(range(n))
        table["intensity.sum.variance"] = flex.double(n, 1.0)
        table["s1"] = flex.vec3_double(n, (0.0, 0.0, -1.0))
        table["flags"] = flex.size_t(n, flex.reflection_table.flags.integrated_sum)
        for number, identifier in zip(ids, names):
            table.experiment_identifiers()[number] = identifier
        table.as_file(str(tmp_path / name))
        return tmp_path / name

    # too little of b is recorded: its number remains its own
    files = [write("1.refl", [(0, "a", 0.5), (1, "b", 0.2), (2, "c", 0.9)]), write("2.refl", [(0, "d", 0.3)])]
    found = module.read_observations(files)
    assert [found.identifiers[number] for number in found.crystal] == ["a", "c", "d"]
    assert found.share.tolist() == pytest.approx([0.5, 0.9, 0.3])
    assert found.select(found.share > 0.4).hkl.tolist() == [[1, 2, 0], [1, 2, 2]]


def test_images_are_told_by_scan_index_or_name(tmp_path):
    content = {
        "imageset": [
            {"images": ["/a/x.nxs"], "single_file_indices": [7]},
            {"images": ["/a/x_0012.cbf"]},
            {"template": "/a/x.nxs"},
        ],
        "scan": [{"image_range": [3, 3]}],
    }
    told = [
        module._image_index(experiment, content, tmp_path)
        for experiment in ({"imageset": 0}, {"imageset": 1}, {"imageset": 2, "scan": 0})
    ]
    assert told == [7, 11, 2]
    with pytest.raises(ValueError, match="cannot tell the image"):
        module._image_index({"imageset": 2}, content, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_dials_indexes_a_simulated_still_where_it_was_put(tmp_path, monkeypatch):
    """Spots found and indexed by DIALS on an image agree with the true orientations and the true geometry."""
    from dials.command_line import find_spots, ssx_index
    from dxtbx.model.experiment_list import ExperimentListFactory

    parameters = SimulationParameters(
        n_images=1,
        hit_rate=1.0,
        lattices=(1.0,),
        seed=5,
        crystal=CrystalParameters(brightness=3000, brightness_spread=0.2),
        header=HeaderParameters(),
    )
    parameters = SimulationParameters(
        **{**vars(parameters), "output": type(parameters.output)(tmp_path / "lyso.nxs", images_per_file=1)}
    )
    simulate(parameters, SerialCommunicator())
    monkeypatch.chdir(tmp_path)
    ExperimentListFactory.from_filenames(["lyso.nxs"]).as_file("imported.expt")
    find_spots.run(["imported.expt", "nproc=1"])
    ssx_index.run(
        ["imported.expt", "strong.refl", "unit_cell=79.1,79.1,38.2,90,90,90", "space_group=P43212", "nproc=1"]
    )
    assert compare_program.main([str(tmp_path), str(tmp_path), "output.json=comparison.json"]) == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert (found["hits"], found["hits_indexed"], found["false_lattices"]) == (1, 1, 0)
    assert found["orientation_error_deg"] < 0.05
    assert found["beam_centre_error_mm"] == pytest.approx(0, abs=1e-6)
    assert found["lattices"] == 1
    # the simulator says of most strong spots that they can be seen
    visible = Simulator(parameters).image(0)[1].visible_spots
    from dials.array_family import flex

    assert len(flex.reflection_table.from_file("strong.refl")) == pytest.approx(visible, rel=0.25)
