"""Simulated intensities obey the space group and Wilson's statistics; simulated cells stay within the symmetry."""

import numpy as np
import pytest

from ssx_mpi.simulation.crystal import crystal_symmetry, make_structure, vary_cell, wilson_amplitudes
from ssx_mpi.simulation.simulation_parameters import CrystalParameters, SimulationError


@pytest.fixture(scope="module")
def lysozyme():
    return make_structure(CrystalParameters(d_min=2.2), np.random.default_rng(1))


def test_systematic_absences_are_absent(lysozyme):
    h, k, l = lysozyme.hkl.astype(int).T
    # P43212: 00l only with l = 4n, h00 and 0k0 only with even index
    assert not np.any((h == 0) & (k == 0) & (l % 4 != 0))
    assert not np.any((k == 0) & (l == 0) & (h % 2 != 0))
    assert not np.any((h == 0) & (l == 0) & (k % 2 != 0))
    assert np.any((h == 0) & (k == 0) & (l == 8))


@pytest.mark.parametrize("symbol", ["P43212", "P213", "C2", "P1", "P6122", "R3:H"])
def test_full_sphere_is_complete_and_each_reflection_there_once(symbol):
    from cctbx import miller

    cells = {
        "P213": (60.1,) * 3 + (90.0,) * 3,
        "P1": (30.1, 35, 40.2, 80, 95, 100),
        "C2": (60.1, 30.2, 40.1, 90, 105, 90),
    }
    hexagonal = (50.3, 50.3, 70.1, 90, 90, 120)
    cell = cells.get(symbol, hexagonal if symbol[0] in "R" or symbol[1] == "6" else (50.3, 50.3, 30.1, 90, 90, 90))
    parameters = CrystalParameters(symbol, tuple(map(float, cell)), d_min=4.0, cell_spread=0.0)
    structure = make_structure(parameters, np.random.default_rng(1))
    hkl = structure.hkl.astype(int)
    assert len(np.unique(hkl, axis=0)) == len(hkl)
    box = np.stack(np.meshgrid(*[np.arange(-20, 21)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    inside = box[structure.symmetry.unit_cell().d(_indices(box)).as_numpy_array() >= 4.0]
    group = structure.symmetry.space_group()
    present = {tuple(row) for row in inside.tolist() if any(row) and not group.is_sys_absent(row)}
    assert present == set(map(tuple, hkl.tolist()))
    equivalents = miller.set(structure.symmetry, _indices(hkl), anomalous_flag=False).map_to_asu().indices()
    assert list(equivalents) == [tuple(row) for row in structure.asu_hkl[structure.unique].tolist()]


def _indices(hkl):
    from cctbx.array_family import flex

    return flex.miller_index([tuple(row) for row in hkl.tolist()])


def test_intensities_have_wilsons_moments(lysozyme):
    from cctbx import miller

    unique = miller.set(lysozyme.symmetry, _indices(lysozyme.asu_hkl), anomalous_flag=False)
    centric = unique.centric_flags().data().as_numpy_array()
    epsilon = unique.epsilons().data().as_double().as_numpy_array()
    z = lysozyme.asu_intensity / epsilon / np.exp(-10 * unique.d_star_sq().data().as_numpy_array())
    for which, moment in ((~centric, 2.0), (centric, 3.0)):
        assert np.mean(z[which] ** 2) / np.mean(z[which]) ** 2 == pytest.approx(moment, rel=0.1)
    assert np.mean(z[centric]) == pytest.approx(np.mean(z[~centric]), rel=0.1)


def test_mean_intensity_falls_with_the_b_factor():
    n = 200_000
    rng = np.random.default_rng(1)
    weak = np.abs(wilson_amplitudes(np.zeros(n, bool), np.ones(n), np.full(n, 0.25), 20.0, rng)) ** 2
    doubled = np.abs(wilson_amplitudes(np.zeros(n, bool), np.full(n, 2.0), np.full(n, 0.25), 20.0, rng)) ** 2
    assert weak.mean() == pytest.approx(1000 * np.exp(-20 * 0.25 / 2), rel=0.02)
    assert doubled.mean() == pytest.approx(2 * weak.mean(), rel=0.02)


def test_intensities_depend_on_the_seed_alone():
    parameters = CrystalParameters(d_min=5.0)
    first, again, other = (make_structure(parameters, np.random.default_rng(s)).asu_intensity for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("symbol", "cell", "free"),
    [
        ("P43212", (79.1, 79.1, 38.2, 90, 90, 90), [0, 2]),
        ("P213", (96.4, 96.4, 96.4, 90, 90, 90), [0]),
        ("P6122", (50, 50, 70, 90, 90, 120), [0, 2]),
        ("C2", (60, 30, 40, 90, 105, 90), [0, 1, 2, 4]),
        ("P1", (30, 35, 40, 80, 95, 100), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_cells_vary_by_the_spread_in_what_symmetry_leaves_free(symbol, cell, free):
    parameters = CrystalParameters(symbol, tuple(map(float, cell)))
    symmetry = crystal_symmetry(parameters)
    rng = np.random.default_rng(1)
    varied = np.array([vary_cell(symmetry, 0.002, rng) for _ in range(600)])
    for one in varied[:20]:
        assert symmetry.customized_copy(unit_cell=tuple(one)).is_compatible_unit_cell()
    relative = varied / np.array(cell) - 1
    assert np.allclose(relative[:, free].std(axis=0), 0.002, rtol=0.15)
    correlation = np.atleast_2d(np.corrcoef(relative[:, free].T))
    assert np.abs(correlation - np.eye(len(free))).max() < 0.2
    fixed = [i for i in (3, 4, 5) if i not in free]
    assert np.allclose(relative[:, fixed], 0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"space_group": "P43213"}, "space_group=P43213"),
        ({"space_group": "P21/c"}, "space_group=P21/c"),
        ({"unit_cell": (79.0, 70.0, 38.0, 90.0, 90.0, 90.0)}, "unit_cell=79,70,38,90,90,90"),
        ({"unit_cell": (79.0, 70.0, 38.0, 10.0, 170.0, 90.0)}, "unit_cell"),
    ],
)
def test_impossible_crystals_are_named(changes, named):
    with pytest.raises(SimulationError, match=named.replace(".", r"\.")):
        crystal_symmetry(CrystalParameters(**changes))
