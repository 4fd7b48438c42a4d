"""Known answers: scales, error model, ambiguity and merged intensities of synthetic crystals."""

from dataclasses import replace

import numpy as np
import pytest
import synthetic

from ssx_mpi.kernels import ambiguity, merging
from ssx_mpi.kernels.ambiguity import relative_agreement
from ssx_mpi.kernels.scaling import Merged, Restraints
from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.reduction_parameters import AmbiguitySettings, MergingSettings, ScalingSettings
from ssx_mpi.reduction import references, resolve, scaling_rounds
from ssx_mpi.reduction.merge import merge
from ssx_mpi.stages.intensities import reflection_data as stage

COMM = SerialCommunicator()


def prepared(observations, truth, setting):
    unique = truth.unique
    shells = merging.resolution_shells(unique.d_star_sq, 20)
    indexed = resolve.index_in_settings(observations, unique, truth.settings, setting)
    start, expected = scaling_rounds.radial_means(COMM, indexed, unique, shells)
    return indexed.include, shells, indexed, start, expected


def test_scaling_recovers_truth():
    observations, truth = synthetic.simulate(synthetic.LYSOZYME, 150, per_crystal=300)
    # one observation in a hundred is of something else
    rng = np.random.default_rng(1)
    wrong = rng.random(len(observations.intensity)) < 0.01
    observations.intensity[wrong] *= rng.uniform(5, 20, wrong.sum())
    _, _, indexed, start, expected = prepared(observations, truth, np.zeros(150, dtype=np.int64))
    scaled = scaling_rounds.scale(COMM, indexed, truth.unique, start, expected, ScalingSettings())
    assert scaled.include.all()
    assert np.std(scaled.scales.log_k - truth.scales.log_k) < 0.05
    assert np.std(scaled.scales.b_factor - truth.scales.b_factor) < 0.8
    # of two observations nobody can tell which is the outlier
    seen = scaled.sums[2].sum(axis=1) > 3
    assert np.corrcoef(scaled.merged.intensity[seen], truth.intensity[seen])[0, 1] > 0.995
    # the noise was made with 1.3 and 0.1, and outliers must not be taken for noise
    assert scaled.noise.a == pytest.approx(1.3, rel=0.07)
    assert scaled.noise.b == pytest.approx(0.1, abs=0.03)
    assert scaled.deviations.overall == pytest.approx(1.0, abs=0.1)
    populated = scaled.deviations.number > 500
    assert np.all(np.abs(scaled.deviations.rms[populated] - 1) < 0.1)
    # the errors of merged intensities are what they are said to be
    factor = np.sum(scaled.merged.intensity * truth.intensity * scaled.merged.weight) / np.sum(
        truth.intensity**2 * scaled.merged.weight
    )
    z = ((scaled.merged.intensity - factor * truth.intensity) * np.sqrt(scaled.merged.weight))[seen]
    assert np.median(np.abs(z)) / 0.6745 == pytest.approx(1.0, abs=0.12)


def test_widths_that_integration_had_wrong_are_found():
    observations, truth = synthetic.simulate(
        synthetic.LYSOZYME, 150, per_crystal=300, b=0.05, background=10.0, broadening=2.0
    )
    unique = truth.unique
    _, _, indexed, start, expected = prepared(observations, truth, np.zeros(150, dtype=np.int64))
    found, without = (
        scaling_rounds.scale(COMM, indexed, unique, begin, mean, ScalingSettings(widths=widths))
        for widths, begin, mean in (
            (True, start, expected),
            (False, *scaling_rounds.radial_means(COMM, indexed, unique, _20_shells(unique), False)),
        )
    )
    trend = found.scales.trend
    expected_trend = 2.0 * (trend.knots - 0.5 * trend.knots[-1])
    np.testing.assert_allclose(trend.values[1:], expected_trend[1:], atol=0.1)
    assert found.converged
    cc = [
        np.corrcoef(s.merged.intensity[s.merged.weight > 0], truth.intensity[s.merged.weight > 0])[0, 1]
        for s in (found, without)
    ]
    assert 1 - cc[0] < 0.5 * (1 - cc[1])
    # what is left is the noise that was put in; without the widths their errors are taken for noise of offsets
    assert found.noise.b == pytest.approx(0.05, abs=0.01) and found.noise.c < 0.02 < without.noise.c


def _20_shells(unique):
    return merging.resolution_shells(unique.d_star_sq, 20)


def test_a_crystal_of_noise_gets_no_say():
    observations, truth = synthetic.simulate(synthetic.LYSOZYME, 60, per_crystal=300)
    rng = np.random.default_rng(1)
    observations.intensity[:300] = rng.permutation(observations.intensity[:300])
    _, _, indexed, start, expected = prepared(observations, truth, np.zeros(60, dtype=np.int64))
    scaled = scaling_rounds.scale(COMM, indexed, truth.unique, start, expected, ScalingSettings())
    rest = slice(1, None)
    assert np.std((scaled.scales.log_k - truth.scales.log_k)[rest]) < 0.06


@pytest.mark.parametrize(
    ("lattice", "n_crystals", "per_crystal"),
    [
        (synthetic.AMBIGUOUS, 200, 100),
        # four settings
        (synthetic.Lattice((60.0, 60.0, 80.0, 90.0, 90.0, 120.0), "P 31", 2.8), 150, 200),
        # an accidental one: two axes alike
        (synthetic.Lattice((60.0, 60.02, 80.0, 90.0, 90.0, 90.0), "P 21 21 21", 2.8), 100, 150),
    ],
)
def test_ambiguity_without_a_reference(lattice, n_crystals, per_crystal):
    observations, truth = synthetic.simulate(lattice, n_crystals, per_crystal=per_crystal, ambiguous=True)
    everything, _, _, start, expected = prepared(observations, truth, np.zeros(n_crystals, dtype=np.int64))
    data = resolve.normalised(observations, everything, truth.unique, truth.settings, start, expected)
    table = ambiguity.composition_table(truth.settings, truth.unique.rotations)
    numbers = np.arange(n_crystals)
    found = resolve.resolve(
        COMM, data, everything, numbers, n_crystals, len(truth.unique), table, AmbiguitySettings(starts=3)
    )
    decided = found.decided
    assert decided.mean() > 0.99
    right = relative_agreement(found.setting[decided], truth.setting[decided], table).max()
    assert right >= 0.99 * decided.sum()
    assert found.start_agreement.max() == 1.0
    assert len(found.start_agreement) == 3
    # the setting that most crystals were indexed in is the common one
    assert found.counts[0] == found.counts.max()


def test_ambiguity_against_a_reference_that_is_the_truth():
    observations, truth = synthetic.simulate(synthetic.AMBIGUOUS, 60, per_crystal=60, ambiguous=True)
    everything, shells, _, start, expected = prepared(observations, truth, np.zeros(60, dtype=np.int64))
    data = resolve.normalised(observations, everything, truth.unique, truth.settings, start, expected)
    reference = references.normalised(Merged(truth.intensity, np.ones(len(truth.unique))), truth.unique, shells)
    found = resolve.resolve_against(COMM, data, everything, reference, AmbiguitySettings())
    assert np.array_equal(found.setting[found.decided], truth.setting[found.decided])
    assert found.decided.mean() > 0.95


def test_crystals_that_cannot_be_told_are_left_out():
    # six reflections a crystal say nothing
    observations, truth = synthetic.simulate(synthetic.AMBIGUOUS, 100, per_crystal=6, ambiguous=True)
    everything, _, _, start, expected = prepared(observations, truth, np.zeros(100, dtype=np.int64))
    data = resolve.normalised(observations, everything, truth.unique, truth.settings, start, expected)
    table = ambiguity.composition_table(truth.settings, truth.unique.rotations)
    found = resolve.resolve(
        COMM, data, everything, np.arange(100), 100, len(truth.unique), table, AmbiguitySettings(starts=2)
    )
    assert found.decided.mean() < 0.2


@pytest.mark.parametrize(("n_crystals", "per_crystal", "right"), [(12, 100, False), (20, 200, True), (30, 60, False)])
def test_settings_that_chance_would_find_are_told_from_those_that_are_right(n_crystals, per_crystal, right):
    observations, truth = synthetic.simulate(synthetic.AMBIGUOUS, n_crystals, per_crystal=per_crystal, ambiguous=True)
    numbers = np.arange(n_crystals)
    everything, _, _, start, expected = prepared(observations, truth, np.zeros(n_crystals, dtype=np.int64))
    data = resolve.normalised(observations, everything, truth.unique, truth.settings, start, expected)
    table = ambiguity.composition_table(truth.settings, truth.unique.rotations)
    found = resolve.resolve(COMM, data, everything, numbers, n_crystals, len(truth.unique), table, AmbiguitySettings())
    # starts and margins alone speak for either
    assert found.decided.mean() > 0.7
    alike = relative_agreement(found.setting, truth.setting, table).max()
    assert (alike >= 0.95 * n_crystals) == right
    assert found.above_chance > 2.0 if right else found.above_chance < 1.2


def test_starts_that_disagree_are_followed_by_more():
    observations, truth = synthetic.simulate(synthetic.AMBIGUOUS, 40, per_crystal=40, ambiguous=True)
    everything, _, _, start, expected = prepared(observations, truth, np.zeros(40, dtype=np.int64))
    data = resolve.normalised(observations, everything, truth.unique, truth.settings, start, expected)
    table = ambiguity.composition_table(truth.settings, truth.unique.rotations)
    found = resolve.resolve(
        COMM, data, everything, np.arange(40), 40, len(truth.unique), table, AmbiguitySettings(starts=3)
    )
    assert len(found.start_agreement) == 12
    assert np.sort(found.start_agreement)[-2] < resolve.SETTLED


def test_tolerance_of_the_lattice_is_respected():
    cell = (60.0, 60.9, 80.0, 90.0, 90.0, 90.0)
    assert len(stage.reindexing_settings(cell, "P 21 21 21", max_delta=0.5)) == 1
    assert len(stage.reindexing_settings(cell, "P 21 21 21", max_delta=2.0)) == 2


def test_merged_data_of_few_crystals_are_cut_where_they_turn_to_noise():
    lattice = synthetic.Lattice(synthetic.LYSOZYME.cell, synthetic.LYSOZYME.space_group, 1.5)
    observations, truth = synthetic.simulate(
        lattice, 9, per_crystal=300, background=4000.0, scale_spread=0.0, b_spread=0.0
    )
    _, _, indexed, start, expected = prepared(observations, truth, np.zeros(9, dtype=np.int64))
    scaled = scaling_rounds.scale(COMM, indexed, truth.unique, start, expected, ScalingSettings())
    data = merge(
        COMM, indexed, np.arange(9), scaled.scales, scaled.noise, scaled.merged, truth.unique, MergingSettings()
    )
    assert data.n_crystals == 9 and data.sums[2].sum() < 1.15 * np.count_nonzero(data.merged.weight)
    # the variance of an observation: over the background, divided by partialities from 0.25 to 1
    variance = 1.3**2 * 4 * 4000.0
    d_min = (np.log(1000.0**2 / (variance * 0.3 / 0.7)) / 20.0) ** -0.5
    assert data.d_min_estimated
    assert data.d_min == pytest.approx(d_min, abs=0.15)


class TestRunaways:
    """Data that made the widths run away, or say little of each crystal."""

    def test_widths_that_are_far_too_large_leave_out_nothing_that_was_recorded(self):
        # integration had the variance of reflections six times too large: what is far from the sphere is not there
        observations, truth = synthetic.simulate(
            synthetic.LYSOZYME, 60, per_crystal=300, b=0.05, background=10.0, broadening=2.0
        )
        partial = np.exp(-0.5 * observations.offset_sq * (6.0 - 1.0)) * 6.0**0.5
        wide = replace(observations, intensity=observations.intensity * partial)
        _, _, indexed, start, expected = prepared(wide, truth, np.zeros(60, dtype=np.int64))
        scaled = scaling_rounds.scale(COMM, indexed, truth.unique, start, expected, ScalingSettings())
        assert scaled.include.all()
        assert scaled.converged
        seen = scaled.merged.weight > 0
        recorded = np.unique(indexed.unique[(indexed.unique >= 0) & (6.0 * observations.offset_sq < 3.0)])
        assert np.mean(seen[recorded]) > 0.95
        assert np.corrcoef(scaled.merged.intensity[seen], truth.intensity[seen])[0, 1] > 0.9

    @pytest.mark.parametrize("n", [3, 6, 12])
    def test_no_crystal_of_a_few_is_lost(self, n):
        observations, truth = synthetic.simulate(synthetic.LYSOZYME, n, per_crystal=200, seed=n)
        _, _, indexed, start, expected = prepared(observations, truth, np.zeros(n, dtype=np.int64))
        scaled = scaling_rounds.scale(COMM, indexed, truth.unique, start, expected, ScalingSettings())
        assert scaled.include.all()
        assert scaled.converged
        # the spread of B that is assumed where the crystals do not tell it
        assert np.abs(scaled.scales.b_factor).max() < 40

    def test_a_model_that_does_not_converge_gives_way_to_a_simpler_one(self, caplog):
        observations, truth = synthetic.simulate(synthetic.LYSOZYME, 20, per_crystal=200)
        _, _, indexed, start, expected = prepared(observations, truth, np.zeros(20, dtype=np.int64))
        hasty = ScalingSettings(max_rounds=2)
        scaled = scaling_rounds.scale(COMM, indexed, truth.unique, start, expected, hasty)
        assert scaled.simplified
        assert (scaled.model, scaled.converged) == ("mean intensities", True)
        assert scaled.include.all()
        np.testing.assert_array_equal(scaled.scales.log_k, start.log_k)


def test_the_spread_of_the_crystals_is_learned_from_them():
    restraints = Restraints()
    many = restraints.learned(1000 * np.array([0.25, 9.0, 0.01]), 1000)
    assert (many.log_k, many.b_factor, many.width) == pytest.approx((0.5, 3.0, 0.1), rel=0.03)
    # of two crystals little is learned
    two = restraints.learned(2 * np.array([0.25, 9.0, 0.01]), 2)
    assert two.b_factor == pytest.approx(np.sqrt((2 * 9.0 + 4 * 100.0) / 6))
    # what is held stays held, and nothing grows without limit
    assert Restraints(b_factor=None, width=None).learned(np.full(3, 1e9), 10) == Restraints(None, None, 1.0, 5.0)


@pytest.mark.parametrize(("n_crystals", "widths"), [(6, False), (60, True)])
def test_widths_are_refined_where_crystals_share_enough(n_crystals, widths):
    observations, truth = synthetic.simulate(synthetic.LYSOZYME, n_crystals, per_crystal=250, broadening=0.5)
    _, _, indexed, start, expected = prepared(observations, truth, np.zeros(n_crystals, dtype=np.int64))
    scaled = scaling_rounds.scale(COMM, indexed, truth.unique, start, expected, ScalingSettings())
    assert bool(np.any(scaled.scales.width)) == widths
    assert scaled.model == scaling_rounds.MODELS[0 if widths else 2].name
    # what is fixed by design is no failure to converge
    assert not scaled.simplified
