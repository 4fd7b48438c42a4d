"""Orientations found from intensities: against truth, in the files, on any ranks, and not where nothing tells."""

import json

import misoriented
import numpy as np
import pytest
from dials.array_family import flex
from fake_ranks import on_fake_ranks
from iotbx import mtz

from ssx_mpi.kernels import orientation
from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.reduction_parameters import MergingSettings, ReductionParameters, ScalingSettings
from ssx_mpi.reduction import loading, procedure
from ssx_mpi.stages.intensities import reflection_data as stage


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    return misoriented.write(tmp_path_factory.mktemp("misoriented"), 24)


def reduce(stills, folder, comm=None, **scaling):
    for name in ("DataFiles", "LogFiles", "data_reduction"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    parameters = ReductionParameters(scaling=ScalingSettings(**scaling), merging=MergingSettings(repeats=2))
    source = loading.Source(stills.path, stills.path.with_suffix(".refl"))
    return procedure.reduce(comm or SerialCommunicator(), [source], parameters, folder)


def merged(folder):
    (array,) = [
        a
        for a in mtz.object(str(folder / "DataFiles" / "merged_full.mtz")).as_miller_arrays()
        if a.info().labels[0] == "IMEAN"
    ]
    hkl = array.indices().as_vec3_double().as_double().as_numpy_array().reshape(-1, 3).astype(np.int32)
    return hkl, array.data().as_numpy_array()


def correlation(folder, stills):
    hkl, intensity = merged(folder)
    row, _ = stills.unique.locate(hkl)
    return float(np.corrcoef(stills.intensity[row], intensity)[0, 1])


def errors_across_the_beam(path, stills):
    """Angles in degrees by which crystals differ from the truth, about the axes that intensities tell."""
    found = []
    content = json.loads(path.read_text())
    for experiment in content["experiment"]:
        crystal = content["crystal"][experiment["crystal"]]
        A = np.linalg.inv(np.array([crystal[f"real_space_{axis}"] for axis in "abc"]))
        turn = stills.A[int(experiment["identifier"].split("-")[1])] @ np.linalg.inv(A)
        found.append(np.degrees(np.hypot(turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0]) / 2))
    return np.array(found)


def test_crystals_come_to_where_they_are(stills, tmp_path):
    summary = reduce(stills, tmp_path / "with")
    reduce(stills, tmp_path / "without", orientations=False)
    before = np.median(errors_across_the_beam(stills.path, stills))
    after = np.median(errors_across_the_beam(tmp_path / "with" / "DataFiles" / "scaled_1.expt", stills))
    assert after < 0.4 * before
    assert summary.scaling["orientations"]["rounds"] >= 1
    assert summary.scaling["orientations"]["gain"] > 0
    # half of what was wrong with the intensities is gone
    assert 1 - correlation(tmp_path / "with", stills) < 0.5 * (1 - correlation(tmp_path / "without", stills))


def test_scaled_files_have_the_partialities_of_the_rotated_crystals(stills, tmp_path):
    reduce(stills, tmp_path)
    table = flex.reflection_table.from_file(str(tmp_path / "DataFiles" / "scaled_1.refl"))
    g = np.array(table["inverse_scale_factor"])
    value, variance = np.array(table["intensity.scale.value"]) / g, np.array(table["intensity.scale.variance"]) / g**2
    hkl = table["miller_index"].as_vec3_double().as_double().as_numpy_array().reshape(-1, 3).astype(np.int32)
    row, _ = stills.unique.locate(hkl)
    weight = np.bincount(row, 1 / variance, len(stills.unique))
    again = np.bincount(row, value / variance, len(stills.unique)) / np.where(weight > 0, weight, 1.0)
    index, intensity = merged(tmp_path)
    at, _ = stills.unique.locate(index)
    # but for those that lost weight as outliers, or far from the sphere
    assert np.isclose(again[at], intensity, rtol=0.02, atol=1.0).mean() > 0.7
    assert np.corrcoef(again[at], intensity)[0, 1] > 0.995


def test_any_number_of_ranks_finds_the_same(stills, tmp_path):
    def angles(comm):
        folder = tmp_path / str(comm.size)
        for name in ("DataFiles", "LogFiles", "data_reduction"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        comm.barrier()
        return reduce(stills, folder, comm).scaling

    (one,) = on_fake_ranks(1, angles)
    for found in on_fake_ranks(3, angles):
        assert found == one
    rotation = [np.load(tmp_path / size / "data_reduction" / "scales_1.npz")["rotation"] for size in "13"]
    np.testing.assert_array_equal(*rotation)
    assert np.any(rotation[0])


def test_derivatives_are_those_of_rotated_crystals(stills):
    """The offset of each reflection after a small rotation, from its setting matrix and from the derivatives."""
    width = stage.EwaldWidth(4e-8, 1e-6)
    selection = stage.Selection(1e-3, None, None, width)
    names, beam = ("shot-0",), np.array([[0.0, 0.0, -1.0]])
    path = str(stills.path.with_suffix(".refl"))
    observations, _ = stage.read_observations(path, names, np.zeros(1, dtype=np.int64), selection, False, beam)
    content = json.loads(stills.path.read_text())["crystal"][0]
    A = np.linalg.inv(np.array([content[f"real_space_{axis}"] for axis in "abc"]))
    angles = np.array([3e-4, -2e-4])
    sigma = np.sqrt(width.at(stage.uctbx.unit_cell(misoriented.LATTICE.cell).d_star_sq(
        stage.to_miller_index(observations.hkl)).as_numpy_array()))  # fmt: skip
    q = observations.hkl @ (orientation.rotation_matrix(beam[0], angles) @ A).T
    offset = (np.linalg.norm(q + beam, axis=1) - 1.0) / sigma
    moved = orientation.rotated(observations, angles[None])
    np.testing.assert_allclose(moved.tilt[:, 0], offset, atol=2e-3)
    assert np.abs(moved.tilt[:, 0] - observations.tilt[:, 0]).max() > 0.1
    # the full intensity times the partiality is what was recorded, wherever the crystal is
    for one, other, power in (
        (observations.intensity, moved.intensity, 0.5),
        (observations.variance, moved.variance, 1),
    ):
        np.testing.assert_allclose(
            one * np.exp(-power * observations.offset_sq), other * np.exp(-power * moved.offset_sq), rtol=1e-5
        )


def test_intensities_that_tell_nothing_leave_crystals_where_they_are(tmp_path):
    stills = misoriented.write(tmp_path / "data", 12, error_deg=0.0)
    path = stills.path.with_suffix(".refl")
    table = flex.reflection_table.from_file(str(path))
    order = flex.size_t(np.random.default_rng(3).permutation(len(table)))
    for name in ("intensity.sum.value", "intensity.sum.variance"):
        table[name] = table[name].select(order)
    table.as_file(str(path))
    (tmp_path / "out").mkdir()
    summary = reduce(stills, tmp_path / "out")
    rotation = np.load(tmp_path / "out" / "data_reduction" / "scales_1.npz")["rotation"]
    assert np.degrees(np.abs(rotation)).max() < 0.005
    assert summary.scaling["orientations"]["rounds"] == 0
