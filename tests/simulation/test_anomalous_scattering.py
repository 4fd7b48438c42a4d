"""Simulated Friedel mates differ as those of a crystal with these atoms do."""

import dataclasses

import numpy as np
import pytest

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.simulation import truth
from ssx_mpi.simulation.anomalous_scattering import AnomalousScatterers, anomalous_scatterers, friedel_mates
from ssx_mpi.simulation.crystal import crystal_symmetry, make_structure
from ssx_mpi.simulation.data_set import simulate
from ssx_mpi.simulation.simulation_parameters import AnomalousParameters, CrystalParameters, SimulationError

CRYSTAL = CrystalParameters(d_min=4.0, cell_spread=0.0)
SELENIUM = AnomalousParameters("Se", 3)


def _scatterers(parameters=SELENIUM, wavelength=0.976):
    return anomalous_scatterers(parameters, crystal_symmetry(CRYSTAL), wavelength, np.random.default_rng(2))


def test_atoms_alone_scatter_as_cctbx_has_it():
    from cctbx import miller, xray
    from cctbx.array_family import flex

    atoms = AnomalousScatterers("Se", np.array([[0.13, 0.21, 0.34], [0.41, 0.05, 0.77]]), -3.0, 5.0)
    unique = miller.build_set(crystal_symmetry(CRYSTAL), anomalous_flag=False, d_min=4.0)
    mates = friedel_mates(np.zeros(unique.size(), complex), unique, atoms, 20.0, 1000.0)
    scatterers = [
        xray.scatterer("Se", site=tuple(site), u=20.0 / (8 * np.pi**2), fp=-3.0, fdp=5.0) for site in atoms.sites
    ]
    structure = xray.structure(crystal_symmetry=unique.crystal_symmetry(), scatterers=flex.xray_scatterer(scatterers))
    structure.scattering_type_registry(table="wk1995")
    for sign, ours in zip((1, -1), mates):
        indices = flex.miller_index([tuple(sign * x for x in index) for index in unique.indices()])
        asked = miller.set(unique, indices, anomalous_flag=True)
        theirs = asked.structure_factors_from_scatterers(structure, algorithm="direct").f_calc()
        intensity = np.abs(np.array(list(theirs.data()))) ** 2
        # the scale k changes slowly with resolution
        order = np.argsort(unique.d_star_sq().data().as_numpy_array())
        seen = intensity[order] > 1e-3 * intensity.max()
        ratio = (ours[order] / np.maximum(intensity[order], 1e-9))[seen]
        assert np.all(np.diff(ratio) > -1e-4 * ratio[:-1])


def test_friedel_mates_of_centric_reflections_are_equal_and_those_of_others_differ():
    structure = make_structure(CRYSTAL, np.random.default_rng(1), _scatterers())
    from cctbx import miller
    from cctbx.array_family import flex

    indices = flex.miller_index([tuple(row) for row in structure.asu_hkl.tolist()])
    centric = miller.set(structure.symmetry, indices, anomalous_flag=False).centric_flags().data().as_numpy_array()
    relative = np.abs(structure.asu_difference) / structure.asu_intensity.mean()
    assert relative[centric].max() < 1e-9
    # of amplitudes: sqrt(2) f'' sqrt(sites) over the root mean square sum of 1,000 light atoms, some 210
    assert 0.02 < np.mean(np.abs(relative[~centric])) / 2 < 0.06


def test_symmetry_equivalents_keep_their_hand():
    structure = make_structure(CRYSTAL, np.random.default_rng(1), _scatterers())
    table = dict(zip(map(tuple, structure.hkl.astype(int).tolist()), structure.intensity))
    for operation in structure.symmetry.space_group().build_derived_point_group().all_ops():
        rotation = np.reshape(operation.r().as_double(), (3, 3))
        for row in range(0, len(structure.asu_hkl), 37):
            plus = tuple(np.rint(structure.asu_hkl[row] @ rotation).astype(int).tolist())
            minus = tuple(-x for x in plus)
            assert table[plus] - table[minus] == pytest.approx(structure.asu_difference[row], abs=1e-6)


def test_dispersion_follows_the_wavelength():
    # the K edge of selenium is at 0.9795 angstrom
    peak, remote = _scatterers(wavelength=0.979), _scatterers(wavelength=1.1)
    assert peak.f_double_prime > 3.5 > 1.0 > remote.f_double_prime
    assert _scatterers(dataclasses.replace(SELENIUM, f_double_prime=7.5)).f_double_prime == 7.5


def test_sites_are_those_given_or_random_ones_apart():
    given = dataclasses.replace(SELENIUM, sites=(0.1, 0.2, 0.3, 0.4, 0.45, 0.6))
    assert np.allclose(_scatterers(given).sites, [[0.1, 0.2, 0.3], [0.4, 0.45, 0.6]])
    assert _scatterers().sites.shape == (3, 3)
    assert _scatterers(AnomalousParameters()) is None


@pytest.mark.parametrize(
    "parameters, said",
    [(AnomalousParameters("Xx"), "not a chemical element"), (AnomalousParameters("Se", 9999), "room")],
)
def test_what_cannot_be_is_refused(parameters, said):
    with pytest.raises(SimulationError, match=said):
        _scatterers(parameters)


def test_truth_has_the_differences_and_a_merged_file_is_compared_with_them(small, tmp_path):
    simulate(small(anomalous=SELENIUM, n_images=2, hit_rate=1.0), SerialCommunicator())
    loaded = truth.load_truth(tmp_path)
    differences = loaded.mates.anomalous_differences()
    assert np.mean(np.abs(differences.data().as_numpy_array())) > 0.02 * np.mean(list(loaded.intensities.data()))
    # the mean over mates is the truth of those who merge them
    mean = loaded.mates.as_non_anomalous_array().merge_equivalents().array()
    both = mean.common_sets(loaded.intensities)
    assert np.allclose(*(np.array(list(array.data())) for array in both), rtol=1e-3, atol=1e-2)

    dataset = loaded.intensities.as_mtz_dataset(column_root_label="IMEAN", wavelength=1.0)
    dataset.add_miller_array(loaded.mates, "I")
    dataset.add_miller_array(loaded.intensities.customized_copy(sigmas=None), "N")
    dataset.mtz_object().write(str(tmp_path / "merged.mtz"))
    reduced = truth.compare_merged(loaded, tmp_path / "merged.mtz")
    assert reduced.n_pairs == differences.size()
    assert reduced.cc_anomalous == pytest.approx(1.0)
    # a mirror takes the other hand
    mirror = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
    assert truth.anomalous_correlation(loaded.mates, loaded.mates, mirror)[1] == pytest.approx(-1.0)
