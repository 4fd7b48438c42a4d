"""The parts of the dispatch that need no MPI."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.parallel.heartbeat import Listening
from ssx_mpi.parallel.schedule import Group, Prefix, Ranges, n_groups


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
        assert 1 <= work.stop - work.start <= max(1, min(longest, left // (4 * workers)))
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


@settings(deadline=None)
@given(st.integers(1, 40_000), st.lists(st.integers(1, 9000), min_size=1, max_size=6))
def test_groups_share_ranks_and_items_without_gap_or_overlap(size, lengths):
    count = n_groups(size, None)
    groups = sorted(
        {Group.of(rank, size, count) for rank in range(0, size, max(1, size // 3000))}, key=lambda g: g.first
    )
    assert [g.number for g in groups] == list(range(count))
    assert [g.first for g in groups] + [size] == [0] + [g.stop for g in groups]
    for group in groups:
        assert Group.of(group.first, size, count) == Group.of(group.stop - 1, size, count) == group
    pending, start = [], 5
    for length in lengths:
        pending.append((start, start + length))
        start += length + 3
    shares = [r for group in groups for r in group.share(pending)]
    items = sorted(i for first, stop in shares for i in range(first, stop))
    assert items == [i for first, stop in pending for i in range(first, stop)]


def test_a_rank_whose_results_are_not_received_begins_no_image():
    from collections import deque

    from ssx_mpi.parallel import message_loop
    from ssx_mpi.parallel.schedule import Work

    loop = object.__new__(message_loop.MpiLoop)
    loop.queue, loop.asked, loop.no_more, loop.group = deque([Work(3, 9)]), True, False, Group.of(0, 4, 1)
    loop.results = [(None, b"")] * message_loop._MOST_UNSENT
    assert loop._next_item() == 3
    loop.results.append((None, b""))
    assert loop._next_item() is None
    loop.results.clear()
    assert loop._next_item() == 4
