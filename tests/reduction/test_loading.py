"""Which files a reduction takes, and what it makes of them."""

import numpy as np
import pytest

from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.reduction import loading


@pytest.fixture
def run(tmp_path):
    """A run of eleven batches, without contents."""
    for number in range(1, 12):
        folder = tmp_path / "run" / f"batch_{number}"
        folder.mkdir(parents=True)
        for suffix in ("expt", "refl"):
            (folder / f"integrated_1.{suffix}").touch()
            (folder / f"indexed.{suffix}").touch()
    return tmp_path / "run"


def names(sources):
    return [source.experiments.parent.name for source in sources]


def test_a_run_is_its_batches_in_their_order(run):
    assert names(loading.find_sources([], [run])) == [f"batch_{n}" for n in range(1, 12)]


def test_a_batch_is_what_was_integrated_in_it(run):
    (source,) = loading.find_sources([run / "batch_3"])
    assert source.experiments == run / "batch_3" / "integrated_1.expt"
    assert source.reflections == run / "batch_3" / "integrated_1.refl"


def test_any_file_of_a_pair_stands_for_both_and_counts_once(run):
    pair = [run / "batch_1" / f"integrated_1.{suffix}" for suffix in ("refl", "expt")]
    assert len(loading.find_sources([*pair, run / "batch_1"], [run])) == 11


@pytest.mark.parametrize("what", ["batch_9/integrated_1.mtz", "nowhere", "."])
def test_what_holds_no_crystals_is_refused_by_name(run, what):
    with pytest.raises(InputError, match=str(run / what)):
        loading.find_sources([run / what])


def test_a_file_without_its_partner_is_refused(run):
    (run / "batch_2" / "integrated_1.refl").unlink()
    with pytest.raises(InputError, match="is not there to go with"):
        loading.find_sources([run / "batch_2" / "integrated_1.expt"])


@pytest.mark.parametrize(("n", "size"), [(10, 3), (2, 5), (0, 4), (1000, 7)])
def test_every_crystal_is_on_one_rank_and_ranks_differ_by_one(n, size):
    shares = [loading.share(n, size, rank) for rank in range(size)]
    assert [i for begin, end in shares for i in range(begin, end)] == list(range(n))
    assert np.ptp([end - begin for begin, end in shares]) <= 1


def test_a_folder_of_a_run_a_batch_or_any_other_may_be_named(run, tmp_path):
    (run / "batch_1").rename(tmp_path / "elsewhere")
    assert names(loading.find_sources([], [tmp_path / "elsewhere"])) == ["elsewhere"]
