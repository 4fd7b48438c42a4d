"""Handing out work: every item once, in order where that matters, whatever the number of ranks."""

from __future__ import annotations

import json
from itertools import chain, starmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PlainJob, run_mpi

from ssx_mpi.parallel import dispatch, schedule, telemetry
from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parallel.stopping import StoppableCommunicator

pending_ranges = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), max_size=4).map(
    lambda gaps: _ranges_from(gaps)
)


def _ranges_from(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges from gaps before and lengths."""
    ranges, at = [], 0
    for gap, length in gaps:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    return ranges


def items_of(pending: list[tuple[int, int]]) -> list[int]:
    return list(chain.from_iterable(starmap(range, pending)))


@given(pending_ranges, st.integers(1, 100), st.integers(1, 64))
@settings(deadline=None, max_examples=50)
def test_ranges_hand_out_every_item_once_and_in_order(pending, workers, longest):
    ranges = schedule.Ranges(pending, workers, longest)
    given_out, lengths = [], []
    while (work := ranges.next()) is not None:
        given_out.extend(range(work.start, work.stop))
        lengths.append(work.stop - work.start)
    assert given_out == items_of(pending)
    assert ranges.remaining == 0
    assert all(1 <= length <= longest for length in lengths)


def test_ranges_shrink_to_single_items():
    ranges = schedule.Ranges([(0, 1000)], workers=4, longest=64)
    lengths = []
    while (work := ranges.next()) is not None:
        lengths.append(work.stop - work.start)
    assert lengths[0] == 62
    assert lengths[-16:] == [1] * 16
    assert lengths == sorted(lengths, reverse=True)


@given(pending_ranges, st.data())
@settings(deadline=None, max_examples=50)
def test_the_prefix_depends_on_the_order_of_items_alone(pending, data):
    items = items_of(pending)
    values = {item: data.draw(st.integers(0, 3)) for item in items}
    wanted = data.draw(st.integers(1, 20))
    prefix = schedule.Prefix(pending, wanted)
    settled = [prefix.add(item, values[item]) for item in data.draw(st.permutations(items))]
    total, end = 0, pending[-1][1] if pending else 0
    for item in items:
        total += values[item]
        if total >= wanted:
            end = item + 1
            break
    assert prefix.end == end
    assert sum(settled) == int(sum(values.values()) >= wanted)


class Squares(PlainJob):
    """Work without images: item i gives i * i, its value is i % 3, and the last item of ten makes news."""

    def __init__(self, comm, stop_at: int | None = None) -> None:
        self.comm, self.stop_at = comm, stop_at
        self.kept: dict[int, int] = {}
        self.heard: list[int] = []
        self.shown: list[int] = []
        self.begun: list[int] = []

    def work(self, item, breathe):
        self.begun.append(item)
        breathe()
        return item % 3, item * item

    def keeper(self, item):
        return item // 10 % self.comm.size

    def keep(self, item, result):
        assert item not in self.kept
        self.kept[item] = result
        return item if item % 10 == 9 else None

    def news(self, content):
        self.heard.append(content)

    def progress(self, done):
        self.shown.append(done)

    def stopping(self):
        return self.stop_at is not None and len(self.begun) >= self.stop_at


def test_one_process_does_the_items_in_order():
    job = Squares(SerialCommunicator())
    end, stopped, traffic = dispatch.run(job.comm, job, [(0, 12), (15, 30)])
    assert job.begun == [*range(12), *range(15, 30)]
    assert job.kept == {i: i * i for i in job.begun}
    assert (end, stopped, job.heard, traffic.items) == (30, False, [9, 19, 29], 27)
    assert job.shown == list(range(1, 28))


def test_one_process_stops_between_items():
    job = Squares(SerialCommunicator(), stop_at=4)
    _end, stopped, _ = dispatch.run(job.comm, job, [(0, 12)])
    assert stopped
    assert sorted(job.kept) == job.begun == [0, 1, 2, 3]


def test_a_stop_after_the_last_item_leaves_nothing_undone():
    job = Squares(SerialCommunicator(), stop_at=12)
    assert dispatch.run(job.comm, job, [(0, 12)])[1] is False


def test_one_process_has_enough_when_it_has():
    job = Squares(SerialCommunicator())
    # values 0 1 2 0 1 2 ...: the sixth item makes 6
    end, stopped, _ = dispatch.run(job.comm, job, [(0, 100)], wanted=6)
    assert (end, stopped, job.begun) == (6, False, list(range(6)))


def test_no_items_at_all():
    job = Squares(SerialCommunicator())
    assert dispatch.run(job.comm, job, [])[:2] == (0, False)


ON_RANKS = """
import json, sys, time
sys.path.insert(0, {folder!r})
from mpi4py import MPI
from ssx_mpi.parallel import dispatch, schedule
from ssx_mpi.parallel.communicator import MpiCommunicator
from test_dispatch import Squares

schedule.DEDICATED_FROM = {dedicated}
comm = MpiCommunicator(MPI.COMM_WORLD)
answers = []
for case in {cases}:
    job = Squares(comm, case.get("stop_at") if comm.rank == case.get("stopping_rank", -1) else None)
    if case.get("slow"):
        quick = job.work
        job.work = lambda item, breathe: (time.sleep(0.002 * (comm.rank + 1)), quick(item, breathe))[1]
    if case.get("late"):
        # rank 0 is last, and what it sends then makes news at a keeper that is slow to say so
        work, keep = job.work, job.keep
        job.work = lambda item, breathe: (
            [(time.sleep(0.01), breathe()) for _ in range(50 * (comm.rank == 0))], work(item, breathe)
        )[1]
        job.keep = lambda item, result: (keep(item, result), time.sleep(0.1), item)[2]
        job.keeper = lambda item: comm.size - 1
    outcome = dispatch.run(comm, job, [tuple(p) for p in case["pending"]], case.get("wanted"))
    parts = comm.gather((job.kept, job.begun, job.heard, outcome[:2]))
    if comm.rank == 0:
        for rank, (kept, begun, heard, _) in enumerate(parts):
            assert all(job.keeper(item) == rank for item in kept), "an item with the wrong keeper"
            assert rank == 0 or not heard
        answers.append({{
            "kept": sorted((i, v) for kept, *_ in parts for i, v in kept.items()),
            "begun": sorted(i for _, begun, *_ in parts for i in begun),
            "workers": [len(begun) for _, begun, *_ in parts],
            "heard": sorted(parts[0][2]),
            "outcomes": [outcome for *_, outcome in parts],
        }})
if comm.rank == 0:
    print(json.dumps(answers))
"""

CASES = [
    {"pending": [[0, 200], [210, 305]]},
    {"pending": []},
    {"pending": [[7, 8]]},
    {"pending": [[0, 400]], "wanted": 50, "slow": True},
    {"pending": [[0, 30]], "wanted": 1000},
    {"pending": [[0, 5]], "late": True},
    {"pending": [[0, 100000]], "stop_at": 5, "stopping_rank": 0, "slow": True},
    {"pending": [[0, 100000]], "stop_at": 5, "stopping_rank": "last", "slow": True},
]


@pytest.mark.parametrize(("n", "dedicated"), [(2, 64), (4, 64), (3, 3)])
def test_ranks_share_the_work(n, dedicated, tmp_path):
    script = tmp_path / "dispatched.py"
    cases = [{k: n - 1 if v == "last" else v for k, v in case.items()} for case in CASES]
    if n == dedicated:
        # a rank that only hands out begins nothing, and so never asks to stop
        cases = [case for case in cases if case.get("stopping_rank") != 0]
    folder = str(__file__).rsplit("/", 1)[0]
    script.write_text(ON_RANKS.format(folder=folder, dedicated=dedicated, cases=cases))
    done = run_mpi(n, [script], timeout=90)
    assert done.status == 0, done.text
    answers = dict(zip((json.dumps(c) for c in cases), json.loads(done.out)))
    for case in cases:
        _check(case, answers[json.dumps(case)], n, dedicated)


def _check(case, answer, n: int, dedicated: int) -> None:
    items = items_of(case["pending"])
    assert answer["kept"] == [[i, i * i] for i in answer["begun"]], "what was begun is kept, once"
    assert len(set(map(tuple, answer["outcomes"]))) == 1, "the ranks agree on the end"
    end, stopped = answer["outcomes"][0]
    if "stop_at" in case:
        assert stopped
        assert 5 <= len(answer["begun"]) < 10_000
        return
    assert not stopped
    if "wanted" in case and case["wanted"] < 200:
        total = 0
        for item in items:
            total += item % 3
            if total >= case["wanted"]:
                break
        assert end == item + 1
        assert set(range(end)) <= set(answer["begun"])
        assert len(answer["begun"]) < len(items), "the rest was not handed out"
        return
    assert answer["begun"] == items
    assert end == (items[-1] + 1 if items else 0)
    assert answer["heard"] == [i for i in items if i % 10 == 9 or "late" in case]
    if n == dedicated:
        assert answer["workers"][0] == 0


def test_summary_adds_up_over_ranks():
    one, two = telemetry.Traffic(), telemetry.Traffic()
    one.items, one.seconds, one.answering, one.bytes, one.coordinates = 3, 2.0, 0.5, 40, True
    two.items, two.seconds, two.waiting = 1, 2.0, 1.0
    one.messages["WORK"], two.messages["REQUEST"], two.messages["WORK"] = 1, 2, 1
    total = telemetry.summary([one, two])
    assert total["messages_per_image"] == 1.0
    assert total["bytes_per_image"] == 10
    assert total["coordinator_busy"] == 0.25
    assert total["waiting"] == 0.25
    assert total["images_of_rank"] == [3, 1]
    assert total["messages"] == {"WORK": 2, "REQUEST": 2}


class Unknown(SerialCommunicator):
    """A communicator of several ranks that is not MPI's own, as one that may be stopped."""

    rank, size = 1, 4


@pytest.mark.parametrize("wrap", [lambda comm: comm, lambda comm: StoppableCommunicator(comm, lambda: False)])
def test_a_communicator_that_is_not_known_is_refused(wrap):
    # every rank would do every item
    with pytest.raises(TypeError, match="cannot be dispatched"):
        dispatch.run(wrap(Unknown()), Squares(SerialCommunicator()), [(0, 4)])
