"""Data sets of resampled crystals: drawn alike on any ranks, merged right, and as far apart as their sigmas say."""

import json

import numpy as np
import pytest
import synthetic
from fake_ranks import on_fake_ranks
from test_reduce_program import columns, remove_handlers, run

from ssx_mpi.kernels import scaling
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise
from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.reduction.loading import share
from ssx_mpi.reduction.resampling import Spread, draws, resampled_sums

SMALL = synthetic.Lattice(synthetic.LYSOZYME.cell, synthetic.LYSOZYME.space_group, 3.5)


@pytest.fixture(autouse=True)
def handlers_removed():
    yield
    remove_handlers()


def in_unique_rows(observations, truth) -> Indexed:
    row, minus = truth.unique.locate(observations.hkl)
    everything = np.ones(observations.n_crystals, dtype=bool)
    return Indexed(observations, truth.unique.d_star_sq, row, minus.astype(np.uint8), everything)


def test_as_many_crystals_are_drawn_and_none_that_was_left_out():
    include = np.arange(1000) % 5 != 0
    times = np.array([draws(SerialCommunicator(), include, k) for k in range(40)])
    assert np.all(times.sum(axis=1) == 800) and not times[:, ~include].any()
    # drawn with replacement: a share of exp(-1) is never drawn, and each crystal once on average
    assert np.mean(times[:, include] == 0) == pytest.approx(np.exp(-1), abs=0.01)
    assert np.var(times[:, include]) == pytest.approx(1.0, abs=0.03)
    assert len({row.tobytes() for row in times}) == 40


@pytest.mark.parametrize("size", [2, 3, 5])
def test_draws_and_sums_are_the_same_on_any_ranks(size):
    observations, truth = synthetic.simulate(SMALL, 23, per_crystal=60)
    data = in_unique_rows(observations, truth).only(np.arange(23) != 7)

    def sums(comm, data, scales):
        merged = Merged(truth.intensity, np.zeros(len(truth.unique)))
        return np.array(list(resampled_sums(comm, data, scales, Noise(1.3, 0.1), merged, 4.0, 3)))

    def on_rank(comm):
        begin, end = share(23, comm.size, comm.rank)
        numbers = np.arange(begin, end)
        part, _ = synthetic.simulate(SMALL, 23, per_crystal=60, numbers=numbers)
        scales = truth.scales.__class__(*(getattr(truth.scales, n)[numbers] for n in ("log_k", "b_factor", "width")),
                                        truth.scales.trend)  # fmt: skip
        return sums(comm, in_unique_rows(part, truth).only(numbers != 7), scales)

    whole = sums(SerialCommunicator(), data, truth.scales)
    assert whole[0].any() and not np.array_equal(whole[0], whole[1])
    for found in on_fake_ranks(size, on_rank):
        np.testing.assert_array_equal(found, whole)


def test_a_crystal_drawn_twice_counts_twice():
    data, scales, noise, whole = well_known(seed=1)
    comm = SerialCommunicator()
    for number, sums in enumerate(resampled_sums(comm, data, scales, noise, Merged.from_sums(whole), 0.0, 5)):
        times = draws(comm, data.include, number)
        expected = np.bincount(data.unique, times[data.observations.crystal()], len(data.d_star_sq))
        np.testing.assert_array_equal(sums[2].sum(axis=1), expected)


# of eight seeds each, spreads scatter by 0.020 and 0.009
@pytest.mark.parametrize("number, tolerance", [(3, 0.08), (40, 0.04)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_intensities_vary_as_sigmas_say_however_few_data_sets_there_are(number, tolerance, seed):
    data, scales, noise, whole = well_known(seed)
    spread = Spread(whole)
    for sums in resampled_sums(SerialCommunicator(), data, scales, noise, Merged.from_sums(whole), 0.0, number):
        spread.add(sums)
    assert spread.over_sigma() == pytest.approx(1.0, abs=tolerance)


def well_known(seed: int):
    """Observations whose errors are what the error model says: with scales, the model, and the sums of all."""
    observations, truth = synthetic.simulate(SMALL, 200, seed=seed, per_crystal=200)
    data, noise = in_unique_rows(observations, truth), Noise(1.3, 0.1)
    current = Merged(truth.intensity, np.zeros(len(truth.unique)))
    return data, truth.scales, noise, scaling.accumulate(data, truth.scales, noise, current, 0.0)


def test_files(lysozyme, tmp_path):
    quick = ("d_min=3.2", "export.scaled=False", "free_flags=new")
    assert run(tmp_path, *lysozyme.paths, *quick, "merging.bootstrap=3") == 0
    data_files = tmp_path / "DataFiles"
    tables = [columns(data_files / f"merged_bootstrap_{number:03d}.mtz") for number in (1, 2, 3)]
    merged = columns(data_files / "merged.mtz")
    index = {tuple(h): row for row, h in enumerate(np.stack([merged[x] for x in "HKL"], axis=1).tolist())}
    for table in tables:
        assert {"IMEAN", "SIGIMEAN", "F", "SIGF", "FreeR_flag", "N"} <= set(table) and "IHALF1" not in table
        rows = np.array([index[tuple(h)] for h in np.stack([table[x] for x in "HKL"], axis=1).tolist()])
        assert 0.9 * len(index) < len(rows) <= len(index)
        np.testing.assert_array_equal(table["FreeR_flag"], merged["FreeR_flag"][rows])
        assert 0.9 < np.corrcoef(table["IMEAN"], merged["IMEAN"][rows])[0, 1] < 0.99999
    assert not np.array_equal(tables[0]["IMEAN"][:50], tables[1]["IMEAN"][:50])
    summary = json.loads((tmp_path / "LogFiles" / "ssx_mpi.reduce.json").read_text())
    assert summary["merged"]["merged"]["bootstrap"]["number"] == 3
    assert "3 data sets of resampled crystals" in (tmp_path / "ssx_mpi.reduce.log").read_text()
    # those of other parameters go
    assert run(tmp_path, *lysozyme.paths, *quick, "merging.bootstrap=1") == 0
    assert len(list(data_files.glob("merged_bootstrap_*"))) == 1
    assert run(tmp_path / "dials", *lysozyme.paths, "engine=dials", "merging.bootstrap=1") == 2
