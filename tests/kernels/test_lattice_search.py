import numpy as np
import pytest
from lattice_stills import CELLS, misorientation, noise_positions, random_rotation, rays_to_spots, still_positions

from ssx_mpi.kernels import lattice_search, lattices


def test_amplitudes_are_those_of_the_sum():
    rng = np.random.default_rng(0)
    q, directions = rng.normal(scale=0.15, size=(77, 3)), lattice_search.hemisphere(300)
    lengths = np.linspace(50, 60, 7)
    amplitude, best = lattice_search.period_amplitudes(q, directions, lengths)
    expected = np.abs(np.exp(2j * np.pi * (directions @ q.T)[:, :, None] * lengths).sum(axis=1))
    # single precision, and polynomials to 5e-5 for each of 77 spots
    assert amplitude == pytest.approx(expected.max(axis=1), abs=0.02)
    assert np.mean(best == expected.argmax(axis=1)) > 0.98


def test_explained_weight_is_that_of_the_definition():
    rng = np.random.default_rng(1)
    q, bases = rng.normal(scale=0.15, size=(53, 3)), rng.normal(scale=30, size=(40, 3, 3))
    h = bases @ q.T
    expected = np.maximum(0, 1 - ((h - np.rint(h)) ** 2).sum(axis=1) / 0.3**2).sum(axis=1)
    assert lattice_search.explained(q, bases, 0.3) == pytest.approx(expected, abs=2e-3)


def test_strongest_leaves_out_neighbours_and_inverses():
    vectors = np.array([[10.0, 0, 0], [10.1, 0, 0], [-10, 0.1, 0], [0, 20, 0]])
    chosen = lattice_search.strongest(vectors, np.array([1.0, 3, 2, 0.5]), 1.0, 10)
    assert chosen.tolist() == [1, 3]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("n, n_noise", [(15, 0), (60, 60)])
def test_known_lattice_is_found_among_noise(name, n, n_noise):
    rng = np.random.default_rng(list(CELLS).index(name))
    basis = lattices.metric_basis(CELLS[name])
    orientation = random_rotation(rng)
    xy, _ = still_positions(rng, basis, orientation, n)
    spots = rays_to_spots(np.concatenate([xy, noise_positions(rng, n_noise)]))
    known = lattices.known_lattice(basis)
    bases, score = lattice_search.search_known(spots.q, known)
    direct = np.linalg.solve(known.basis @ np.linalg.inv(basis), bases[0])
    assert misorientation(direct, orientation, basis) < 0.3
    assert score[0] > 0.8 * len(xy)


def test_lattice_is_found_where_the_beam_is_off_by_three_pixels():
    rng = np.random.default_rng(7)
    basis = lattices.metric_basis(CELLS["cubic"])
    orientation = random_rotation(rng)
    xy, _ = still_positions(rng, basis, orientation, 80)
    spots = rays_to_spots(xy + np.array([3 * 0.172, -2 * 0.172]))
    bases, _ = lattice_search.search_known(spots.q, lattices.known_lattice(basis))
    assert misorientation(bases[0], orientation, basis) < 1.0


def test_search_turns_with_the_experiment():
    rng = np.random.default_rng(3)
    basis = lattices.metric_basis(CELLS["monoclinic"])
    xy, _ = still_positions(rng, basis, random_rotation(rng), 50)
    q = rays_to_spots(xy).q
    known = lattices.known_lattice(basis)
    turn = random_rotation(rng)
    one = lattice_search.search_known(q, known)[0][0]
    other = lattice_search.search_known(q @ turn.T, known)[0][0]
    u, _, vt = np.linalg.svd(np.linalg.inv(known.basis) @ one)
    assert misorientation(other, turn @ (u @ vt).T, known.basis) < 0.05


def test_search_does_not_depend_on_the_order_of_the_spots():
    rng = np.random.default_rng(4)
    basis = lattices.metric_basis(CELLS["tetragonal"])
    xy, _ = still_positions(rng, basis, random_rotation(rng), 50)
    q = rays_to_spots(xy).q
    known = lattices.known_lattice(basis)
    one = lattice_search.search_known(q, known)
    other = lattice_search.search_known(rng.permutation(q), known)
    assert (one[0] == other[0]).all() and (one[1] == other[1]).all()


@pytest.mark.parametrize("name", ["tetragonal", "monoclinic", "triclinic"])
def test_unknown_cell_is_found(name):
    rng = np.random.default_rng(11)
    basis = lattices.metric_basis(CELLS[name])
    orientation = random_rotation(rng)
    xy, _ = still_positions(rng, basis, orientation, 150)
    q = rays_to_spots(np.concatenate([xy, noise_positions(rng, 20)])).q
    bases, score = lattice_search.search_unknown(q, 3.0, 190.0, 25.0)
    expected = np.linalg.norm(lattices.reduce_basis(basis), axis=1)
    lengths = np.linalg.norm(bases, axis=2)
    match = np.abs(lengths / expected - 1).max(axis=1) < 0.02
    assert match.any()
    assert score[match].max() > 0.8 * score.max()
