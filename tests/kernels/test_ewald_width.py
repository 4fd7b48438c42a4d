"""The width of reflections that their recorded intensities show, against a known one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.kernels.ewald_width import EwaldWidth, ProfileBins, fit_width


def recorded(width: EwaldWidth, n: int, seed: int, reach: float = 4.0, noise: float = 5.0, constant: float = 0.0):
    """1/d^2, excitation errors and recorded intensities of Wilson-distributed reflections; `reach` in true widths."""
    rng = np.random.default_rng(seed)
    d_star_sq = 0.25 * rng.random(n) ** (2 / 3)
    excitation = reach * np.sqrt(width.at(np.array(0.25))) * rng.random(n)
    full = 1000.0 * np.exp(-10.0 * d_star_sq) * rng.exponential(1.0, n)
    share = np.exp(-0.5 * excitation**2 / width.at(d_star_sq)) / width.spread(width.at(d_star_sq))
    return d_star_sq, excitation, full * (share + constant) + noise * rng.standard_normal(n)


def fitted(d_star_sq, excitation, intensity) -> EwaldWidth | None:
    bins = ProfileBins.up_to(d_star_sq.max(), excitation.max())
    return fit_width(bins, bins.sums(d_star_sq, excitation, intensity))


# the same examples every time: one in some hundreds is off by a little more
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    common=st.floats(1e-9, 3e-7), growth=st.floats(1e-7, 3e-6), reach=st.floats(3.0, 15.0), seed=st.integers(0, 1000)
)
def test_the_true_width_is_found_however_far_integration_reached(common, growth, reach, seed):
    width = EwaldWidth(common, growth)
    found = fitted(*recorded(width, 60_000, seed, reach))
    assert found is not None
    for d in (8.0, 4.0, 2.5, 2.0):
        assert found.at(d**-2.0) == pytest.approx(width.at(d**-2.0), rel=0.2), d


def test_what_is_left_of_neighbours_does_not_widen_it():
    width = EwaldWidth(3e-8, 7e-7)
    found = fitted(*recorded(width, 60_000, 1, reach=10.0, constant=0.03))
    assert found is not None
    assert found.at(0.1) == pytest.approx(width.at(0.1), rel=0.15)


def test_a_few_crystals_are_enough():
    width = EwaldWidth(3e-8, 7e-7)
    found = fitted(*recorded(width, 3000, 2))
    assert found is not None
    assert found.at(0.1) == pytest.approx(width.at(0.1), rel=0.3)


@pytest.mark.parametrize("kind", ["no signal", "recorded whole", "hardly any"])
def test_where_the_intensities_say_nothing_there_is_no_width(kind):
    d_star_sq, excitation, intensity = recorded(EwaldWidth(3e-8, 7e-7), 50 if kind == "hardly any" else 5000, 3)
    rng = np.random.default_rng(4)
    if kind == "no signal":
        intensity = rng.normal(0.0, 10.0, len(intensity))
    elif kind == "recorded whole":
        intensity = rng.exponential(100.0, len(intensity))
    assert fitted(d_star_sq, excitation, intensity) is None


def test_sums_add_up_over_ranks():
    arrays = recorded(EwaldWidth(3e-8, 7e-7), 4000, 5)
    whole = [np.rint(x) if k == 2 else x for k, x in enumerate(arrays)]
    bins = ProfileBins.up_to(whole[0].max(), whole[1].max())
    parts = [bins.sums(*(x[rows] for x in whole)) for rows in (slice(0, 1234), slice(1234, None))]
    np.testing.assert_array_equal(parts[0] + parts[1], bins.sums(*whole))


def test_the_full_intensity_is_that_recorded_on_the_sphere_times_the_width():
    width = EwaldWidth(0.0, 1e-6)
    # twice the width at 2.5 angstrom, where the variance is four times that at 5
    assert width.spread(width.at(np.array([0.04, 0.16]))) == pytest.approx([1.0, 2.0])
