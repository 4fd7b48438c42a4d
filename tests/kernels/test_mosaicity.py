import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.kernels import mosaicity


def soft_box(rng, half_width):
    """delta psi drawn from the probability of the model, one for each half width."""
    psi = np.empty(len(half_width))
    for i, m in enumerate(half_width):
        while True:
            z = rng.uniform(-2, 2)
            p = np.exp(-np.logaddexp(0, 10 * (z + 1)) - np.logaddexp(0, 10 * (1 - z)) + 2 * np.logaddexp(0, 10))
            if rng.uniform() < p:
                psi[i] = z * m
                break
    return psi


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_derivatives_are_the_finite_differences(seed):
    rng = np.random.default_rng(seed)
    d, psi = rng.uniform(2, 20, 50), rng.normal(scale=0.003, size=50)
    x = np.array([2 / rng.uniform(300, 5000), rng.uniform(5e-4, 1e-2)])
    _, gradient, hessian = mosaicity.negative_log_likelihood(x, d, psi)
    for k in range(2):
        step = np.zeros(2)
        step[k] = 1e-5 * x[k]
        up, down = (mosaicity.negative_log_likelihood(x + s * step, d, psi) for s in (1, -1))
        assert gradient[k] == pytest.approx((up[0] - down[0]) / (2 * step[k]), rel=1e-4, abs=1e-4 / x[k])
        assert hessian[k] == pytest.approx((up[1] - down[1]) / (2 * step[k]), rel=1e-3, abs=1e-3 / x[k] / x.min())


@pytest.mark.parametrize("eta_deg, size", [(0.2, 1000.0), (0.1, 2000.0), (0.4, 4000.0)])
def test_truth_is_recovered(eta_deg, size):
    rng = np.random.default_rng(1)
    d = 1 / np.linspace(1 / 30, 1 / 1.8, 1500)
    eta = np.radians(eta_deg)
    psi = soft_box(rng, d / size + eta / 2)
    found = mosaicity.fit_mosaicity(d, psi, 5e5)
    assert np.degrees(found.eta) == pytest.approx(eta_deg, rel=0.1)
    assert found.domain_size == pytest.approx(size, rel=0.15)
    assert 0.85 < found.accepted.mean() < 1


def test_likelihood_is_at_least_that_of_dials():
    from scitbx.array_family import flex

    minimizer = pytest.importorskip("xfel.mono_simulation.max_like", reason="this DIALS comes without it").minimizer

    for seed in range(5):
        rng = np.random.default_rng(seed)
        d = rng.uniform(1.8, 15, 150)
        psi = soft_box(rng, d / rng.uniform(300, 3000) + rng.uniform(5e-4, 4e-3))
        theirs = minimizer(d_i=flex.double(d), psi_i=flex.double(psi), eta_rad=0.004, Deff=1000.0)
        found = mosaicity.fit_mosaicity(d, psi, 5e5)
        mine = mosaicity.negative_log_likelihood(np.array([2 / found.domain_size, found.eta]), d, psi)[0]
        assert mine <= mosaicity.negative_log_likelihood(np.array(theirs.x), d, psi)[0] + 0.01


def test_spread_too_small_to_see_ends_at_the_bound():
    rng = np.random.default_rng(2)
    d = rng.uniform(2, 10, 300)
    found = mosaicity.fit_mosaicity(d, soft_box(rng, d / 800), 5e5)
    assert found.domain_size == pytest.approx(800, rel=0.1)
    assert np.degrees(found.eta) < 0.02


def test_volume_is_that_of_dials():
    of_dials = pytest.importorskip("xfel.mono_simulation.util", reason="this DIALS comes without it")
    ewald_proximal_volume = of_dials.ewald_proximal_volume

    mosaic = mosaicity.Mosaicity(0.003, 900.0, np.ones(1, dtype=bool))
    assert mosaicity.ewald_proximal_volume(1.2, 2.0, mosaic) == pytest.approx(
        ewald_proximal_volume(1.2, 2.0, 900.0, 0.003), rel=1e-12
    )


def test_crystal_model_is_wider_than_the_likelihood_says():
    mosaic = mosaicity.Mosaicity(np.radians(0.2), 1400.0, np.ones(1, dtype=bool))
    assert mosaic.half_mosaicity_deg == pytest.approx(0.14)
    assert mosaic.expanded_domain_size == pytest.approx(1000.0)


def test_too_few_spots_are_refused():
    with pytest.raises(ValueError, match="too few"):
        mosaicity.fit_mosaicity(np.ones(2), np.ones(2), 1e5)
