from itertools import islice

import numpy as np
import pytest
from cctbx import crystal, sgtbx, uctbx
from dials.algorithms.indexing.basis_vector_search import FFT1D, RealSpaceGridSearch
from dials.algorithms.indexing.basis_vector_search.combinations import (
    candidate_orientation_matrices,
    filter_known_symmetry,
)
from dxtbx.model import Crystal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lattice_stills import misorientation, noise_positions, random_rotation, rays_to_spots, still_positions
from libtbx import phil
from scitbx import matrix
from scitbx.array_family import flex

from ssx_mpi.kernels import fourier_search, lattices
from ssx_mpi.stages.fast.target import Target

# cell, space group, spots of the lattice, spots elsewhere; the last one's grid is too fine for the whole hemisphere
STILLS = {
    "tetragonal": ((57.8, 57.8, 150.2, 90, 90, 90), "P41212", 150, 40),
    "cubic": ((96.4, 96.4, 96.4, 90, 90, 90), "P213", 150, 20),
    "monoclinic": ((50.0, 60.0, 75.0, 90, 105, 90), "P21", 80, 80),
    "body-centred": ((80.0, 95.0, 110.0, 90, 90, 90), "I222", 120, 10),
    "long": ((92.0, 92.0, 250.0, 90, 90, 120), "P6122", 150, 30),
}


def still(name, seed=5):
    """Spots of a still, the true orientation, and the target of the search."""
    cell, group, n, n_noise = STILLS[name]
    rng = np.random.default_rng(seed)
    target = Target.from_cell(uctbx.unit_cell(cell), sgtbx.space_group_info(group).group())
    orientation = random_rotation(rng)
    xy, _ = still_positions(rng, target.model.primitive @ target.model.basis, orientation, n)
    return rays_to_spots(np.concatenate([xy, noise_positions(rng, n_noise)])).q, orientation, target


def criterion(target, length=0.1, angle=5.0, delta=5.0):
    return lattices.CellCriterion.of(
        target.known, target.operations, np.linalg.inv(target.to_reduced), length, angle, delta
    )


def as_flex(q):
    return flex.vec3_double(np.ascontiguousarray(q))


def as_array(vectors):
    return np.array([v.elems for v in vectors])


@pytest.mark.parametrize("name", STILLS)
def test_lattice_vectors_are_those_of_dials(name):
    q, _, target = still(name)
    max_cell = 1.3 * target.lengths.max()
    params = phil.parse("characteristic_grid = None\n.type = float").extract()
    theirs = as_array(FFT1D(max_cell, params).find_basis_vectors(as_flex(q))[0])
    assert len(theirs) >= 3
    ours = fourier_search.lattice_vectors(q, max_cell)
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_the_grid_of_directions_may_be_given():
    q, _, _ = still("cubic")
    params = phil.parse("characteristic_grid = 0.05\n.type = float").extract()
    theirs = as_array(FFT1D(125.0, params).find_basis_vectors(as_flex(q))[0])
    assert fourier_search.lattice_vectors(q, 125.0, 0.05) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("name", ["cubic", "body-centred"])
def test_vectors_of_known_lengths_are_those_of_dials(name):
    q, _, target = still(name)
    params = phil.parse("characteristic_grid = 0.03\n.type = float\nmax_vectors = 20\n.type = int").extract()
    # a cell of these axes; its angles do not matter
    cell = uctbx.unit_cell((*target.lengths, 90, 90, 90))
    theirs = as_array(RealSpaceGridSearch(200.0, cell, params).find_basis_vectors(as_flex(q))[0])
    ours = fourier_search.vectors_of_known_lengths(q, target.lengths, 0.03, 20)
    # axes of equal length and sums that are equal in single precision may change places
    distance = np.linalg.norm(theirs[:, None] - ours, axis=2)
    assert distance.min(axis=1).max() < 1e-9 and distance.min(axis=0).max() < 1e-9
    assert np.mean(np.linalg.norm(theirs - ours, axis=1) < 1e-9) > 0.8


@pytest.mark.parametrize("name", STILLS)
def test_bases_are_those_that_dials_would_refine(name):
    q, orientation, target = still(name)
    vectors = fourier_search.lattice_vectors(q, 1.3 * target.lengths.max())
    cell, group, _, _ = STILLS[name]
    symmetry = crystal.symmetry(uctbx.unit_cell(cell), space_group_symbol=group)
    models = candidate_orientation_matrices([matrix.col(tuple(v)) for v in vectors])
    theirs = [np.linalg.inv(np.reshape(m.get_A(), (3, 3))) for m in islice(filter_known_symmetry(models, symmetry), 5)]
    ours = list(islice(fourier_search.known_bases(vectors, target.known, criterion(target)), 5))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        # the same lattice in another setting
        change = one @ np.linalg.inv(other)
        assert change == pytest.approx(np.rint(change), abs=1e-6)
        assert abs(np.linalg.det(change)) == pytest.approx(1)
    back = np.linalg.inv(target.to_reduced) @ ours[0]
    assert misorientation(back, orientation, target.model.basis) < 1.0


@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(STILLS)))
@example(seed=247130, name="monoclinic")  # c and a + c change places
@example(seed=307, name="long")
@settings(deadline=None, max_examples=30)
def test_criterion_for_the_cell_is_that_of_dials(seed, name):
    rng = np.random.default_rng(seed)
    cell, symbol, _, _ = STILLS[name]
    group = sgtbx.space_group_info(symbol).group()
    target = Target.from_cell(uctbx.unit_cell(cell), group)
    basis = target.known.basis @ (np.eye(3) + rng.normal(scale=0.03, size=(3, 3)))
    symmetry = crystal.symmetry(uctbx.unit_cell(cell), space_group_symbol=symbol)
    models = candidate_orientation_matrices([matrix.col(tuple(v)) for v in basis])
    # the same but for what lies on the edge
    strict = {"relative_length_tolerance": 0.08, "absolute_angle_tolerance": 4.0, "max_delta": 4.0}
    ours = list(fourier_search.known_bases(basis, target.known, criterion(target)))
    if any(True for _ in filter_known_symmetry(models, symmetry, **strict)):
        assert len(ours) == 1
    # DIALS looks at one setting of the basis; in ours the symmetric cell is that of the space group
    for one in ours:
        a, b, c = (tuple(row) for row in np.linalg.inv(target.to_reduced) @ one)
        lengths_and_angles = Crystal(a, b, c, space_group=sgtbx.space_group("P 1")).get_unit_cell()
        mean = np.array(group.average_unit_cell(lengths_and_angles).parameters())
        assert mean[:3] == pytest.approx(cell[:3], rel=0.1) and mean[3:] == pytest.approx(cell[3:], abs=5.0)


def test_the_vectors_do_not_depend_on_the_order_of_the_spots():
    q, _, _ = still("tetragonal")
    one = fourier_search.lattice_vectors(q, 195.0)
    other = fourier_search.lattice_vectors(np.random.default_rng(0).permutation(q), 195.0)
    assert (one == other).all()


def test_amplitude_is_that_of_the_histogram():
    rng = np.random.default_rng(3)
    q, direction = rng.normal(scale=0.1, size=(50, 3)), np.array([[0.6, 0.0, 0.8]])
    found = fourier_search.strongest_periods(q, direction, 100.0)
    projection = q @ direction[0]
    low, extent = projection.min(), np.ptp(projection)
    n = next(m for m in range(1 + int(extent * 500), 10_000) if not _rest(m) > 1)
    bins = np.bincount(np.floor((projection - low) / (extent / (n - 1)) + 0.5).astype(int), minlength=n)
    modulus = np.abs(np.fft.rfft(bins))[3:]
    assert found.amplitude[0] == pytest.approx(modulus.max(), rel=1e-5)
    assert found.length[0] == pytest.approx((3 + modulus.argmax()) * (n - 1) / n / extent)


def _rest(m):
    for factor in (2, 3, 5):
        while m % factor == 0:
            m //= factor
    return m


@pytest.mark.parametrize("flat", [(1, 1, 0), (1, 0, 0), (0, 0, 0)])
def test_spots_in_a_plane_on_a_line_and_in_a_point_are_no_fault(flat):
    q = np.random.default_rng(1).normal(scale=0.1, size=(40, 3)) * flat + np.array([0.01, 0.02, 0.03])
    with np.errstate(all="raise"):
        vectors = fourier_search.lattice_vectors(q, 100.0)
    assert np.isfinite(vectors).all()
    target = still("cubic")[2]
    assert len(list(fourier_search.known_bases(vectors, target.known, criterion(target)))) == 0


def test_hardly_any_resolution_is_no_fault():
    # rays so near to the beam that all projections on it fall into one bin
    q = np.random.default_rng(1).normal(scale=0.01, size=(40, 3)) * (1, 1, 1e-4)
    assert np.isfinite(fourier_search.lattice_vectors(q, 60.0)).all()
