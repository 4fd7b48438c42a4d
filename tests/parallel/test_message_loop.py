"""The message loop on simulated ranks: any number of them, any order of events, silence and stops."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from unittest import mock

import pytest
from fake_mpi import Clock, on_simulated_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssx_mpi.parallel import dispatch, heartbeat, message_loop, schedule

TEN = 10


@dataclass
class Counting:
    """Item i gives i * i, its value is i % 3; ten items have a keeper, and the last of them that is kept is news."""

    rank: int
    size: int
    clock: Clock
    seconds: float = 0.01
    stop_after: int | None = None
    keep_seconds: float = 0.0
    begun: list[int] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)
    noted: list[int] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    silences: list[tuple[int, float]] = field(default_factory=list)
    waits: int = 0
    breathes: bool = True

    def work(self, item, breathe):
        self.begun.append(item)
        self.clock.sleep(self.seconds / 2)
        if self.breathes:
            breathe()
        self.clock.sleep(self.seconds / 2)
        return item % 3, item * item

    def note(self, value):
        self.noted.append(value)
        return value

    def keeper(self, item):
        return item // TEN % self.size

    def keep(self, item, result):
        assert item not in self.kept
        self.kept[item] = result
        if self.keep_seconds:
            self.clock.sleep(self.keep_seconds)
        first = item // TEN * TEN
        return first if all(i in self.kept for i in range(first, first + TEN)) else None

    def news(self, content):
        self.heard.append(content)

    def progress(self, done):
        self.shown.append(done)

    def stopping(self):
        return self.stop_after is not None and len(self.begun) >= self.stop_after

    def waiting(self):
        self.waits += 1

    def silent(self, rank, seconds):
        self.silences.append((rank, seconds))


@dataclass
class Done:
    """All ranks after a dispatch."""

    jobs: list[Counting]
    outcomes: list[tuple[int, bool]]
    traffics: list
    turns: int
    seconds: float

    @property
    def begun(self) -> list[int]:
        return sorted(item for job in self.jobs for item in job.begun)

    @property
    def kept(self) -> dict[int, int]:
        return {item: value for job in self.jobs for item, value in job.kept.items()}


def dispatched(size, pending, wanted=None, longest=8, seed=0, latency=1e-3, change=lambda job: None) -> Done:
    def on_rank(comm, clock):
        job = Counting(comm.rank, comm.size, clock)
        change(job)
        end, stopped, traffic = dispatch.run(comm, job, pending, wanted, longest)
        return job, (end, stopped), traffic

    results, world = on_simulated_ranks(size, on_rank, seed, latency)
    jobs, outcomes, traffics = (list(column) for column in zip(*results))
    for job in jobs:
        assert all(job.keeper(item) == job.rank for item in job.kept)
        assert job.rank == 0 or not (job.heard or job.noted or job.shown)
    assert len(set(outcomes)) == 1, "the ranks agree on the end"
    return Done(jobs, outcomes, traffics, world.turns, world.now)


def groups_of(ranks, dedicated=64, stretch=1024):
    """Few ranks in groups as thousands are, with coordinators that work too below `dedicated` ranks."""
    return mock.patch.multiple(schedule, RANKS_PER_COORDINATOR=ranks, DEDICATED_FROM=dedicated, _STRETCH=stretch)


def in_order(pending):
    return [item for start, stop in pending for item in range(start, stop)]


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(1, 9),
    group=st.sampled_from([2, 3, 1024]),
    dedicated=st.sampled_from([2, 3, 64]),
    lengths=st.lists(st.integers(0, 40), max_size=3),
    longest=st.sampled_from([1, 4, 64]),
    latency=st.sampled_from([0.0, 1e-3, 0.1]),
    seed=st.integers(0, 10_000),
)
def test_every_item_is_done_once_kept_by_its_keeper_and_heard_of(
    size, group, dedicated, lengths, longest, latency, seed
):
    pending, at = [], 0
    for length in lengths:
        pending.append((at, at + length))
        at += length + 5
    if size == 1:
        # a coordinator that does nothing else needs others
        dedicated = 64
    with groups_of(group, dedicated, stretch=7):
        done = dispatched(size, pending, longest=longest, seed=seed, latency=latency)
    items = in_order(pending)
    assert done.begun == items
    assert done.kept == {i: i * i for i in items}
    root = done.jobs[0]
    whole = [t for t in range(0, at, TEN) if all(i in done.kept for i in range(t, t + TEN))]
    assert sorted(root.heard) == whole
    assert Counter(root.noted) == Counter(i % 3 for i in items)
    assert root.shown[-1] == len(items)
    assert root.shown == sorted(root.shown)
    assert done.outcomes[0] == (pending[-1][1] if pending else 0, False)
    assert [t.items for t in done.traffics] == [len(job.begun) for job in done.jobs]


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(size=st.integers(2, 8), who=st.integers(0, 7), group=st.sampled_from([2, 1024]), seed=st.integers(0, 10_000))
def test_one_rank_that_stops_stops_all_and_loses_nothing(size, who, group, seed):
    def change(job):
        job.stop_after = 3 if job.rank == who % size else None

    with groups_of(group):
        done = dispatched(size, [(0, 5000)], longest=64, seed=seed, change=change)
    assert done.outcomes[0][1] is True
    assert 3 <= len(done.begun) < 40 * size
    assert done.kept == {i: i * i for i in done.begun}
    assert len(done.jobs[0].noted) == len(done.begun)


def test_a_stop_after_the_last_item_left_nothing_undone():
    done = dispatched(1, [(0, 3)], change=lambda job: setattr(job, "stop_after", 3))
    assert done.outcomes == [(3, False)]


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(size=st.integers(1, 7), wanted=st.integers(1, 60), seed=st.integers(0, 10_000))
def test_the_first_items_that_are_worth_enough_end_it(size, wanted, seed):
    done = dispatched(size, [(0, 400)], wanted=wanted, longest=4, seed=seed)
    total, end = 0, 0
    while total < wanted:
        total += end % 3
        end += 1
    assert done.outcomes[0] == (end, False)
    assert set(range(end)) <= set(done.kept)
    # what was handed out before is finished, but nothing more begun
    assert len(done.begun) <= end + 10 * size * 4


def test_items_that_are_not_finished_are_neither_kept_nor_counted():
    def change(job):
        work = job.work
        job.work = lambda item, breathe: None if item % 2 else work(item, breathe)

    done = dispatched(3, [(0, 30)], change=change)
    assert sorted(done.kept) == list(range(0, 30, 2))
    assert len(done.jobs[0].noted) == 15
    assert sum(t.items for t in done.traffics) == 15


def test_a_coordinator_of_many_only_coordinates():
    with groups_of(1024, dedicated=4):
        done = dispatched(4, [(0, 60)])
    assert not done.jobs[0].begun
    assert all(job.begun for job in done.jobs[1:])
    assert [t.coordinates for t in done.traffics] == [True, False, False, False]


def test_the_work_is_shared_evenly():
    done = dispatched(5, [(0, 500)], longest=64)
    shares = [len(job.begun) for job in done.jobs]
    # half a percent of the items are the last single ones
    assert max(shares) - min(shares) <= 5
    # a rank waits for an answer no longer than a message or two are under way
    assert done.seconds < 1.1 * 500 / 5 * 0.01


def test_messages_travel_once_for_a_range_and_once_for_a_result():
    done = dispatched(4, [(0, 400)], longest=16)
    messages = sum((t.messages for t in done.traffics), Counter())
    assert messages["REPORT"] == 3
    assert messages["REQUEST"] == messages["WORK"]
    assert messages["REQUEST"] < 400 / 4
    assert messages["RESULT"] == sum(job.keeper(item) != job.rank for job in done.jobs for item in job.begun)
    assert messages["NEWS"] == sum(done.jobs[0].keeper(tens) != 0 for tens in done.jobs[0].heard)
    assert "BEAT" not in messages
    assert "SILENT" not in messages
    assert all(t.bytes > 0 and t.answering >= 0 and t.seconds > 0 for t in done.traffics)


def test_first_ranges_are_taken_without_asking():
    done = dispatched(3, [(0, 3)])
    # one item each, and the answer to all that there is no more
    assert [job.begun for job in done.jobs] == [[0], [1], [2]]


class TestSilence:
    """A rank that is not heard of for long is named, by whoever hears it."""

    @pytest.fixture(autouse=True)
    def patience(self):
        """Hours are waited through in steps of half a second."""
        with mock.patch.object(message_loop, "_POLL", 0.5):
            yield

    def test_of_a_worker_rank_0_hears(self):
        def change(job):
            if job.rank == 2:
                job.work = lambda item, breathe: (job.clock.sleep(400.0), (0, 0))[1]

        done = dispatched(3, [(0, 3)], longest=1, change=change)
        named = done.jobs[0].silences
        assert {rank for rank, _ in named} == {2}
        # again whenever the silence has doubled
        seconds = [s for _, s in named]
        assert seconds[0] == pytest.approx(heartbeat.SILENT, rel=0.1)
        assert all(later >= 2 * earlier for earlier, later in pairwise(seconds))
        assert len(seconds) == 3
        assert not done.jobs[1].silences

    def test_a_rank_that_breathes_is_heard(self):
        def change(job):
            if job.rank == 2:
                job.work = lambda item, breathe: ([(job.clock.sleep(10.0), breathe()) for _ in range(40)], (0, 0))[1]

        done = dispatched(3, [(0, 3)], longest=1, change=change)
        assert not any(job.silences for job in done.jobs)
        # one beat for each twenty seconds and a little
        beats = done.traffics[2].messages["BEAT"]
        assert 400 / 30 - 1 <= beats <= 400 / heartbeat.BEAT
        assert not done.traffics[0].messages["BEAT"]

    def test_of_rank_0_the_next_rank_hears(self):
        def change(job):
            if job.rank == 0:
                job.seconds, job.breathes = 300.0, False

        # rank 1 asks for more, and waits
        done = dispatched(2, [(0, 4)], longest=1, change=change)
        assert {rank for rank, _ in done.jobs[1].silences} == {0}

    def test_in_a_group_rank_0_is_told(self):
        def change(job):
            if job.rank == 5:
                job.seconds, job.breathes = 300.0, False

        with groups_of(3, stretch=2):
            done = dispatched(6, [(0, 24)], longest=1, change=change)
        assert {rank for rank, _ in done.jobs[0].silences} == {5}
        assert not done.jobs[3].silences
        assert done.traffics[3].messages["SILENT"] == len(done.jobs[0].silences)

    def test_who_has_no_more_to_do_is_let_go(self):
        def change(job):
            if job.rank == 1:
                job.work = lambda item, breathe: ([(job.clock.sleep(10.0), breathe()) for _ in range(40)], (0, 0))[1]

        # rank 2 waits six minutes for the end, and says nothing
        done = dispatched(3, [(0, 3)], longest=1, change=change)
        assert done.traffics[2].seconds > 390
        assert not done.traffics[2].messages["BEAT"]
        assert not any(job.silences for job in done.jobs)


def test_coordinators_tell_rank_0_once_a_second():
    def change(job):
        job.seconds = 0.05

    with groups_of(3, stretch=10):
        done = dispatched(6, [(0, 600)], longest=4, change=change)
    told = done.traffics[3].messages["FINISHED"]
    assert done.seconds / 2 - 1 <= told <= done.seconds + 2


def test_results_wait_for_a_keeper_that_is_slow():
    """Back pressure: no rank has more than some results on their way, and it begins no item meanwhile."""
    most = 0
    send = message_loop.MpiLoop._send

    def sending(loop, content, to, tag):
        nonlocal most
        send(loop, content, to, tag)
        most = max(most, len(loop.results))

    def change(job):
        job.seconds, job.keeper = 0.001, lambda item: 1
        if job.rank == 1:
            job.keep_seconds = 0.05

    with mock.patch.object(message_loop.MpiLoop, "_send", sending):
        done = dispatched(3, [(0, 200)], longest=64, change=change)
    assert len(done.kept) == 200
    assert most == message_loop._MOST_UNSENT + 1
