import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lattice_stills import PANEL, S0, misorientation, noise_positions, random_rotation, rays_to_spots, still_positions

from ssx_mpi.kernels import lattice_refinement, lattices
from ssx_mpi.kernels.lattice_refinement import Lattice

TETRAGONAL = lattices.metric_basis((57.8, 57.8, 150.2, 90, 90, 90))
TRICLINIC = lattices.metric_basis((40, 50, 62, 80, 84, 97))
FREE = lattice_refinement.invariant_strains(np.eye(3)[None])


def rotation_about(axis, degrees):
    axis = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
    k = np.cross(np.eye(3), -axis)
    t = np.radians(degrees)
    return np.eye(3) + np.sin(t) * k + (1 - np.cos(t)) * k @ k


@pytest.mark.parametrize(
    "cell, n",
    [
        ((50, 60, 70, 80, 85, 95), 6),
        ((50, 60, 70, 90, 105, 90), 4),
        ((50, 60, 70, 90, 90, 90), 3),
        ((50, 50, 70, 90, 90, 90), 2),
        ((50, 50, 70, 90, 90, 120), 2),
        ((50, 50, 50, 90, 90, 90), 1),
    ],
)
def test_number_of_free_strains_is_that_of_the_crystal_system(cell, n):
    basis = lattices.metric_basis(cell)
    rotations = lattices.lattice_rotations(lattices.reduce_basis(basis))
    strains = lattice_refinement.invariant_strains(rotations)
    assert len(strains) == n
    assert np.einsum("gij,kjl,gml->gkim", rotations, strains, rotations) == pytest.approx(
        np.broadcast_to(strains, (len(rotations), *strains.shape)), abs=1e-9
    )


def test_prediction_is_that_of_dials():
    from dials.algorithms.spot_prediction import StillsReflectionPredictor
    from dials.array_family import flex
    from dxtbx.model import BeamFactory, Crystal, DetectorFactory, Experiment

    rng = np.random.default_rng(0)
    orientation = random_rotation(rng)
    lattice = Lattice(orientation, TRICLINIC)
    xy, h = still_positions(rng, TRICLINIC, orientation, 60)
    a, b, c = (tuple(row) for row in lattice.direct)
    detector = DetectorFactory.from_dict(
        {
            "panels": [
                {
                    "fast_axis": (1, 0, 0),
                    "slow_axis": (0, -1, 0),
                    "origin": (-210, 210, -250),
                    "pixel_size": (0.172, 0.172),
                    "image_size": (2441, 2441),
                    "trusted_range": (0, 1e6),
                    "type": "SENSOR_PAD",
                }
            ],
            "hierarchy": {"children": [{"panel": 0}]},
        }
    )
    experiment = Experiment(
        beam=BeamFactory.make_beam(s0=tuple(S0)), detector=detector, crystal=Crystal(a, b, c, space_group_symbol="P1")
    )
    table = flex.reflection_table()
    table["miller_index"] = flex.miller_index([tuple(map(int, x)) for x in h])
    table["panel"] = flex.size_t(len(h), 0)
    table["id"] = flex.int(len(h), 0)
    table["entering"] = flex.bool(len(h), False)
    StillsReflectionPredictor(experiment, spherical_relp=False).for_reflection_table(table, experiment.crystal.get_A())
    spots = rays_to_spots(xy)
    mine = lattice_refinement.predict(h, lattice, spots.d_inverse, S0)
    assert mine.xy == pytest.approx(np.array(list(table["xyzcal.mm"]))[:, :2], abs=1e-8)
    assert mine.delta_psi == pytest.approx(np.array(list(table["delpsical.rad"])), abs=1e-12)
    assert mine.s1 == pytest.approx(np.array(list(table["s1"])), abs=1e-12)


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_gradients_are_the_finite_differences(seed):
    rng = np.random.default_rng(seed)
    q = rng.normal(scale=0.2, size=(20, 3)) + np.array([0, 0, 0.02])
    dq = rng.normal(scale=0.2, size=(2, 20, 3))
    # away from the beam and from the backward direction, where the azimuth is undefined
    good = (np.hypot(q[:, 0], q[:, 1]) > 0.05) & (np.linalg.norm(q, axis=1) < 0.8)
    q, dq = q[good], dq[:, good]
    d_inverse = np.broadcast_to(np.linalg.inv(PANEL), (len(q), 3, 3))
    _, dxy, dpsi = lattice_refinement.prediction_gradients(q, dq, d_inverse, S0)
    step = 1e-6
    for k in range(2):
        up = lattice_refinement.prediction_gradients(q + step * dq[k], dq, d_inverse, S0)[0]
        down = lattice_refinement.prediction_gradients(q - step * dq[k], dq, d_inverse, S0)[0]
        assert dxy[k] == pytest.approx((up.xy - down.xy) / (2 * step), rel=1e-4, abs=1e-2)
        assert dpsi[k] == pytest.approx((up.delta_psi - down.delta_psi) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("basis", [TETRAGONAL, TRICLINIC], ids=["tetragonal", "triclinic"])
def test_refinement_recovers_orientation_and_cell(basis):
    rng = np.random.default_rng(5)
    orientation = random_rotation(rng)
    xy, h = still_positions(rng, basis, orientation, 200, mosaic_deg=0.02, sigma_px=0.05)
    strains = lattice_refinement.invariant_strains(lattices.lattice_rotations(lattices.reduce_basis(basis)))
    stretched = basis @ (np.eye(3) + 0.004 * strains.sum(axis=0))
    start = Lattice(rotation_about([1, 2, 3], 0.4) @ orientation, stretched)
    fit = lattice_refinement.refine_lattice(rays_to_spots(xy), h, start, strains)
    assert misorientation(fit.lattice.direct, orientation, basis) < 0.01
    assert np.linalg.norm(fit.lattice.basis, axis=1) == pytest.approx(np.linalg.norm(basis, axis=1), rel=5e-4)
    # what the symmetry demands holds exactly
    metric = fit.lattice.basis @ fit.lattice.basis.T
    if basis is TETRAGONAL:
        assert metric[0, 0] == pytest.approx(metric[1, 1], rel=1e-12)
        assert np.abs(metric - np.diag(np.diag(metric))).max() < 1e-8 * metric.max()


@pytest.mark.parametrize("overstated", [0.5, 5.0])
def test_balanced_weight_is_the_ratio_of_the_variances(overstated):
    """Whatever the errors of the centroids are said to be, the orientation is as good as with the true ones."""
    strains = lattice_refinement.invariant_strains(lattices.lattice_rotations(lattices.reduce_basis(TETRAGONAL)))
    errors = {"constant": [], "balanced": [], "true": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        orientation = random_rotation(rng)
        xy, h = still_positions(rng, TETRAGONAL, orientation, 120, mosaic_deg=0.1, sigma_px=0.06)
        true = Lattice(orientation, TETRAGONAL)
        spots = rays_to_spots(xy, sigma_px=0.06 * overstated)
        fit = lattice_refinement.refine_lattice(spots, h, true, strains)
        weight = lattice_refinement.balanced_weight(spots, h, fit.lattice, 3 + len(strains))
        delta_psi = lattice_refinement.predict(h, true, spots.d_inverse, spots.s0).delta_psi
        assert weight == pytest.approx(1 / overstated**2 / np.mean(delta_psi**2), rel=0.6)
        balanced = lattice_refinement.refine_lattice(spots, h, fit.lattice, strains, weight)
        rays = rays_to_spots(xy, sigma_px=0.06)
        best = lattice_refinement.refine_lattice(rays, h, true, strains, 1 / np.mean(delta_psi**2))
        for name, result in (("constant", fit), ("balanced", balanced), ("true", best)):
            errors[name].append(misorientation(result.lattice.direct, orientation, TETRAGONAL))
    assert np.mean(errors["balanced"]) < 1.1 * np.mean(errors["true"])
    if overstated > 1:
        assert np.mean(errors["balanced"]) < 0.7 * np.mean(errors["constant"])


def test_refinement_turns_with_the_experiment():
    rng = np.random.default_rng(6)
    orientation = random_rotation(rng)
    xy, h = still_positions(rng, TRICLINIC, orientation, 100)
    spots = rays_to_spots(xy)
    turn = random_rotation(rng)
    turned = lattice_refinement.Spots(
        spots.q @ turn.T, spots.xy, spots.weight, spots.d_inverse @ turn.T, turn @ spots.s0
    )
    one = lattice_refinement.refine_lattice(spots, h, Lattice(orientation, TRICLINIC), FREE)
    other = lattice_refinement.refine_lattice(turned, h, Lattice(turn @ orientation, TRICLINIC), FREE)
    assert other.lattice.direct @ turn == pytest.approx(one.lattice.direct, abs=1e-5)
    assert other.target == pytest.approx(one.target, rel=1e-6)


def test_too_few_spots_are_refused():
    rng = np.random.default_rng(6)
    orientation = random_rotation(rng)
    xy, h = still_positions(rng, TRICLINIC, orientation, 2)
    with pytest.raises(ValueError, match="do not determine"):
        lattice_refinement.refine_lattice(rays_to_spots(xy), h, Lattice(orientation, TRICLINIC), FREE)


def test_indices_are_assigned_as_by_dials():
    import dials_algorithms_indexing_ext as ext
    from cctbx.array_family import flex

    rng = np.random.default_rng(8)
    lattices = [Lattice(random_rotation(rng), TETRAGONAL) for _ in range(2)]
    q = rng.normal(scale=0.15, size=(3000, 3))
    direct = np.array([x.direct for x in lattices])
    number, h = lattice_refinement.assign_indices(q, direct, 0.3)
    theirs = ext.AssignIndices(
        flex.vec3_double(q.tolist()),
        flex.double(len(q), 0.0),
        flex.mat3_double([tuple(x.setting.ravel()) for x in lattices]),
        tolerance=0.3,
    )
    ids, indices = np.array(list(theirs.crystal_ids())), np.array(list(theirs.miller_indices()))
    # DIALS keeps the number of the lattice for the reflection 0 0 0; it leaves the index out either way
    indexed = indices.any(axis=1)
    assert (h == indices).all()
    assert (number[indexed] == ids[indexed]).all()
    assert (number[~indexed] == -1).all()


def test_outliers_are_those_of_sauter_and_poon():
    import iotbx.phil
    from rstbx.indexing_api import outlier_detection
    from rstbx.phil.phil_preferences import indexing_api_defs

    phil = iotbx.phil.parse(input_string=indexing_api_defs).extract()

    class Match:
        def __init__(self, dx, dy):
            self.x_obs, self.y_obs, self.x_calc, self.y_calc, self.miller_index = dx, dy, 0.0, 0.0, (0, 0, 1)

    for seed in range(20):
        rng = np.random.default_rng(seed)
        inner = rng.normal(scale=0.08, size=(200, 2))
        outer = rng.uniform(-1, 1, size=(60, 2))
        delta = np.concatenate([inner, outer])
        mine = lattice_refinement.positional_outliers(np.linalg.norm(delta, axis=1))
        theirs = outlier_detection.find_outliers_from_matches(
            [Match(*d) for d in delta], verbose=False, horizon_phil=phil
        )
        rejected = ~np.array(list(theirs.get_cache_status()))
        # the minimiser there follows the slope of another target, and stops a little off the minimum
        assert abs(mine.sum() - rejected.sum()) <= 1
        assert (mine == rejected).mean() >= 1 - 1 / len(delta)


def test_few_spots_have_no_outliers():
    assert not lattice_refinement.positional_outliers(np.arange(9.0)).any()


def test_chance_tells_lattices_from_noise():
    rng = np.random.default_rng(9)
    orientation = random_rotation(rng)
    volume = np.linalg.det(TETRAGONAL)
    xy, h = still_positions(rng, TETRAGONAL, orientation, 15)
    true = lattice_refinement.chance(rays_to_spots(xy), h, Lattice(orientation, TETRAGONAL), 30, 2, 8, volume)
    assert true < -20
    # random spots given the indices of the nearest lattice points
    spots = rays_to_spots(noise_positions(rng, 60))
    lattice = Lattice(random_rotation(rng), TETRAGONAL)
    number, h = lattice_refinement.assign_indices(spots.q, lattice.direct[None], 0.3)
    own = number == 0
    noise = lattice_refinement.chance(spots.select(own), h[own], lattice, 60, 2, 8, volume)
    assert noise > 0
