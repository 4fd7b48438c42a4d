"""The parts of the dispatch that need no MPI."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.parallel.dispatch import Listening, Prefix, Ranges


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=5), st.integers(1, 9000), st.integers(1, 64), st.booleans())
def test_ranges_hand_out_everything_once_in_order_and_shrink(lengths, workers, longest, gaps):
    pending, start = [], 0
    for length in lengths:
        pending.append((start, start + length))
        start += length + (7 if gaps else 0)
    ranges = Ranges(pending, workers, longest)
    items: list[int] = []
    while (work := ranges.next()) is not None:
        # nobody holds more than a quarter of what would be its share of the rest
        left = sum(lengths) - len(items)
        assert 1 <= work.stop - work.start <= max(1 + workers // 4096, min(longest, left // (4 * workers)))
        items += range(work.start, work.stop)
    assert items == [i for start, stop in pending for i in range(start, stop)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 30), st.randoms())
def test_the_cutoff_depends_on_the_order_of_items_alone(values, wanted, random):
    finished = list(enumerate(values))
    random.shuffle(finished)
    prefix = Prefix([(0, len(values))], wanted)
    for item, value in finished:
        prefix.add(item, value)
    sums = [sum(values[: i + 1]) for i in range(len(values))]
    expected = next((i + 1 for i, total in enumerate(sums) if total >= wanted), len(values))
    assert prefix.end == expected


def test_silent_ranks_are_named_at_doubling_times_until_they_speak():
    listening = Listening(range(1, 4), now=0.0)
    listening.heard(2, 50.0)
    listening.let_go(3)
    assert listening.silent(59.0) == []
    assert listening.silent(70.0) == [(1, 70.0)]
    assert listening.silent(100.0) == []
    assert listening.silent(145.0) == [(1, 145.0), (2, 95.0)]
    listening.heard(1, 150.0)
    assert listening.silent(160.0) == []
