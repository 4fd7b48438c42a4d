import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lattice_stills import CELLS, random_rotation

from ssx_mpi.kernels import lattices

ROTATIONS = {"cubic": 24, "tetragonal": 8, "hexagonal": 12, "orthorhombic": 4, "monoclinic": 2, "triclinic": 1}


def test_basis_has_the_cell_that_it_was_made_of():
    cell = CELLS["triclinic"]
    basis = lattices.metric_basis(cell)
    a, b, c = basis
    assert np.linalg.norm(basis, axis=1) == pytest.approx(cell[:3])
    angle = [np.degrees(np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))) for x, y in ((b, c), (a, c), (a, b))]
    assert angle == pytest.approx(cell[3:])


def test_impossible_angles_are_refused():
    with pytest.raises(ValueError, match="make no cell"):
        lattices.metric_basis((50, 50, 50, 30, 30, 120))


@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(CELLS)))
@settings(deadline=None, max_examples=50)
def test_reduction_finds_the_same_basis_from_any_setting(seed, name):
    rng = np.random.default_rng(seed)
    basis = lattices.metric_basis(CELLS[name])
    shear = np.eye(3, dtype=int)
    for _ in range(4):
        i, j = rng.choice(3, size=2, replace=False)
        shear[i] += rng.integers(-2, 3) * shear[j]
    reduced = lattices.reduce_basis(shear @ basis)
    expected = lattices.reduce_basis(basis)
    assert np.linalg.norm(reduced, axis=1) == pytest.approx(np.linalg.norm(expected, axis=1))
    assert np.linalg.det(reduced) == pytest.approx(abs(np.linalg.det(basis)))


@pytest.mark.parametrize("name", CELLS)
def test_rotations_of_the_lattice_are_its_holohedry(name):
    basis = lattices.reduce_basis(lattices.metric_basis(CELLS[name]))
    rotations = lattices.lattice_rotations(basis)
    assert len(rotations) == ROTATIONS[name]
    assert rotations[0] == pytest.approx(np.eye(3))
    images = basis @ rotations.transpose(0, 2, 1) @ np.linalg.inv(basis)
    assert np.abs(images - np.rint(images)).max() < 1e-6


@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(CELLS)))
@settings(deadline=None, max_examples=30)
def test_metrics_transform_as_bases_do(seed, name):
    rng = np.random.default_rng(seed)
    bases = lattices.metric_basis(CELLS[name]) @ rng.normal(size=(4, 3, 3))
    changes = rng.integers(-2, 3, size=(5, 3, 3)).astype(float)
    transformed = lattices.metric_transforms(changes) @ lattices.packed_metric(bases)[:, None, :, None]
    for k, basis in enumerate(bases):
        assert transformed[k, :, :, 0] == pytest.approx(lattices.packed_metric(changes @ basis), abs=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_known_lattice_has_a_way_back_from_other_reduced_bases(name):
    known = lattices.known_lattice(lattices.metric_basis(CELLS[name]))
    turn = random_rotation(np.random.default_rng(0))
    reduced = lattices.reduce_basis(np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]]) @ known.basis @ turn.T)
    back = known.settings @ reduced
    assert np.abs(back @ back.transpose(0, 2, 1) - known.basis @ known.basis.T).sum(axis=(1, 2)).min() < 1e-6
