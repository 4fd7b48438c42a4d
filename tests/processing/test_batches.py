"""All images in batches: what is begun, what is told to rank 0, and how it ends."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from fake_mpi import on_simulated_ranks
from made_stills import BEAM, COMMON, DETECTOR, MadeStills, QuietWatch

from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.run_parameters import ReportSettings
from ssx_mpi.processing import batches as module
from ssx_mpi.processing.batches import Batches, process_batches
from ssx_mpi.processing.failures import FailureShare, Outcome
from ssx_mpi.processing.resume import BatchKeeping, survey
from ssx_mpi.records import batch_files
from ssx_mpi.stages.still_results import Failure, Still

ALL = ("find_spots", "index", "integrate")
IDENTITY = {"run": "abc"}


def a_job(folder, steps=ALL, watch=None, processor=None, n_images=14, **more):
    keeping = BatchKeeping(batch_files.batches(folder, n_images, 4), 4, IDENTITY, COMMON, True, 1)
    found = survey(SerialCommunicator(), keeping, steps)
    parts = {
        "stored": None,
        "failures": FailureShare(0.98),
        "hear": lambda news: None,
        "progress": lambda done: None,
        **more,
    }
    return Batches(
        comm=SerialCommunicator(),
        keeping=keeping,
        survey=found,
        processor=processor or MadeStills(),
        watch=watch or QuietWatch(),
        **parts,
    )


@pytest.mark.parametrize(
    ("suspects", "pending"),
    [
        (set(), [(0, 4), (4, 8), (8, 12), (12, 14)]),
        ({5}, [(0, 4), (4, 5), (6, 8), (8, 12), (12, 14), (5, 6)]),
        # the first, the last and two beside each other
        ({0, 7, 9, 10}, [(1, 4), (4, 7), (8, 9), (11, 12), (12, 14), (0, 1), (7, 8), (9, 10), (10, 11)]),
        ({99}, [(0, 4), (4, 8), (8, 12), (12, 14)]),
    ],
)
def test_images_that_may_have_ended_an_earlier_run_are_last(tmp_path, suspects, pending):
    assert a_job(tmp_path, watch=QuietWatch(suspects=suspects)).pending == pending


def test_an_image_goes_through_all_steps_and_the_rank_breathes_between_them(tmp_path):
    job, breaths = a_job(tmp_path), []
    outcome, record = job.work(5, lambda: breaths.append(1))
    assert outcome == Outcome(True, True, n_crystals=1)
    assert job.processor.done == [("find_spots", 5), ("index", 5), ("integrate", 5)]
    assert (len(breaths), job.watch.breaths) == (2, 2)
    assert job.processor.records == [(5, ALL)]
    assert isinstance(record, bytes)


@pytest.mark.parametrize(
    ("steps", "indexed", "done"),
    [(("index",), False, ["index"]), (("integrate",), True, ["integrate"]), (("index", "integrate"), False, None)],
)
def test_later_steps_begin_with_what_is_stored(tmp_path, steps, indexed, done):
    made, loaded = MadeStills(), []

    def load(image, indexed):
        loaded.append((image, indexed))
        still = made.find_spots(image)
        still = made.index(still) if indexed else still
        made.done.clear()
        return still

    job = a_job(tmp_path, steps=("find_spots",), processor=made, stored=SimpleNamespace(load=load))
    job.survey.steps.update(dict.fromkeys(job.survey.steps, steps))
    job.work(3, lambda: None)
    assert loaded == [(3, indexed)]
    assert [stage for stage, _ in made.done] == (done or ["index", "integrate"])


def test_of_steps_that_are_not_asked_for_nothing_is_done(tmp_path):
    job = a_job(tmp_path, steps=("find_spots",))
    assert job.work(1, lambda: None)[0] == Outcome(True, False)
    assert job.processor.done == [("find_spots", 1)]


def test_abandoned_because_all_stops_an_image_is_not_finished(tmp_path):
    from ssx_mpi.processing.watch import ImageAbandoned

    class Stopped(QuietWatch):
        def image(self, image, work):
            self.ask("stop")
            raise ImageAbandoned

    job = a_job(tmp_path, watch=Stopped())
    assert job.work(0, lambda: None) is None
    assert job.processor.records == []


def test_too_many_failures_of_one_kind_are_a_reason_to_stop(tmp_path, caplog):
    job = a_job(tmp_path, failures=FailureShare(0.5))
    for _ in range(199):
        assert job.note(Outcome(True, False, "index: no lattice found")) == 0
    assert not job.stopping()
    job.note(Outcome(True, False, "index: no lattice found"))
    assert job.stopping()
    assert job.watch.reason.startswith("because 200 of 200 hits failed in one way")


def test_the_first_traceback_of_a_reason_is_in_the_debug_log(tmp_path, caplog):
    job = a_job(tmp_path)
    with caplog.at_level("DEBUG", "ssx_mpi"):
        job.note(Outcome(True, False, "index: odd", "Traceback: here"))
        job.note(Outcome(True, False, "index: odd"))
    assert caplog.text.count("Traceback: here") == 1


def test_a_batch_is_news_when_its_last_image_is_kept(tmp_path):
    merged = []
    job = a_job(tmp_path, merge=lambda folder: merged.append(folder) or "sums")
    for image in (7, 4, 6):
        assert job.keep(image, job.work(image, lambda: None)[1]) is None
    assert list(job.survey.records) == [2]
    news = job.keep(5, job.work(5, lambda: None)[1])
    assert (news.number, news.merged, news.statistics.counts["images"]) == (2, "sums", 4)
    assert merged == [tmp_path / "batch_2"]
    assert job.survey.records == {}
    assert batch_files.read_summary(job.keeping.batches[1], IDENTITY)["steps"] == list(ALL)
    heard = []
    job.hear = heard.append
    job.news(news)
    assert heard == [news]


def test_without_live_merge_news_have_nothing_merged(tmp_path):
    job = a_job(tmp_path, n_images=1)
    assert job.keep(0, job.work(0, lambda: None)[1]).merged is None


def test_where_a_silent_rank_is_and_what_it_does_is_logged(tmp_path, caplog):
    job = a_job(tmp_path)
    job.silent(3, 130.0)
    assert "Nothing heard of rank 3 on node7 for 2 min, at image x.nxs:6 for 61 s" in caplog.text
    job.watch.whereabouts = lambda rank: ("", None, None)
    job.silent(4, 70.0)
    assert "rank 4 on ? for" in caplog.text
    assert caplog.text.splitlines()[-1].count("at image") == 0


def a_run(folder, watch, processor, n_images=14, steps=ALL, **more):
    parameters = SimpleNamespace(
        image_steps=steps,
        steps=more.pop("all_steps", steps),
        batch_size=4,
        keep_intermediate=True,
        max_failures=more.pop("max_failures", 0.98),
        live_merge=False,
        unit_cell=None,
        space_group=None,
        report=ReportSettings(live=more.pop("live", False)),
        identity=lambda: {"d_min": None},
    )
    return SimpleNamespace(
        parameters=parameters,
        directory=folder,
        images=range(n_images),
        watch=watch,
        identity=IDENTITY,
        batches=batch_files.batches(folder, n_images, 4),
        maker=SimpleNamespace(with_geometry=lambda geometry: None),
        processor=lambda geometry: processor,
    )


def processed(size, folder, seed=0, **more):
    """Exit codes and stills done by rank, and what ``ssx_mpi.json`` says."""

    def on_rank(comm, clock):
        processor = more.get("processor", MadeStills)()
        watch = more.get("watch", QuietWatch)()
        given = {k: v for k, v in more.items() if k not in ("processor", "watch")}
        run = a_run(folder, watch, processor, **given)
        return process_batches(comm, run, (DETECTOR, BEAM), 0.0), processor.done

    results, _ = on_simulated_ranks(size, on_rank, seed)
    statuses, done = zip(*results)
    assert len(set(statuses)) == 1
    return statuses[0], done, json.loads((folder / "ssx_mpi.json").read_text())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_images_are_done_once_on_any_number_of_ranks(tmp_path, size):
    status, done, told = processed(size, tmp_path, seed=size)
    assert status is ExitCode.DONE
    found = Counter(image for own in done for stage, image in own if stage == "find_spots")
    assert found == Counter(range(14))
    assert told["state"] == "done"
    assert told["total"]["counts"]["crystals"] == 14
    assert (told["n_batches"], told["ranks"], told["n_images"]) == (4, size, 14)
    assert sorted(told["batches"]) == ["1", "2", "3", "4"]
    assert sum(told["dispatch"]["images_of_rank"]) == 14
    for number in range(1, 5):
        assert (tmp_path / "DataFiles" / f"integrated_{number}.refl").resolve().exists()


def test_files_are_the_same_on_any_number_of_ranks(tmp_path):
    for size in (1, 3):
        processed(size, tmp_path / str(size))
    one, three = (
        {p.relative_to(tmp_path / size): p.read_bytes() for p in sorted((tmp_path / size).glob("batch_*/*"))}
        for size in ("1", "3")
    )
    assert len(one) == 4 * 8
    assert one == three


def test_what_was_finished_before_is_counted_and_not_done_again(tmp_path, caplog):
    def stopping():
        watch = QuietWatch()
        watch.stopping = lambda: len(watch.worked) >= 6
        watch.reason = "on request"
        return watch

    status, done, told = processed(1, tmp_path, watch=stopping)
    assert (status, told["state"]) == (ExitCode.STOPPED, "stopped")
    assert [image for stage, image in done[0] if stage == "find_spots"] == list(range(6))
    assert told["total"]["counts"]["images"] == 4
    with caplog.at_level("INFO", "ssx_mpi"):
        status, done, told = processed(1, tmp_path)
    assert [image for stage, image in done[0] if stage == "find_spots"] == list(range(6, 14))
    assert (status, told["total"]["counts"]["images"]) == (ExitCode.DONE, 14)
    assert "6 of 14 images are finished already" in caplog.text


@pytest.mark.parametrize(
    ("processor", "steps", "status", "state"),
    [
        (lambda: MadeStills(n_spots=lambda i: 3), ALL, ExitCode.NOTHING_FOUND, "nothing_found"),
        (lambda: MadeStills(n_lattices=lambda i: 0), ALL, ExitCode.NOTHING_FOUND, "nothing_found"),
        # where nothing is integrated, hits are what was wanted
        (lambda: MadeStills(n_lattices=lambda i: 0), ("find_spots", "index"), ExitCode.DONE, "done"),
        (lambda: MadeStills(n_spots=lambda i: 3), ("find_spots",), ExitCode.NOTHING_FOUND, "nothing_found"),
        (lambda: MadeStills(n_lattices=lambda i: i == 9), ALL, ExitCode.DONE, "done"),
    ],
)
def test_how_it_ends_depends_on_what_came_out(tmp_path, caplog, processor, steps, status, state):
    with caplog.at_level("INFO", "ssx_mpi"):
        found, _, told = processed(1, tmp_path, processor=processor, steps=steps)
    assert (found, told["state"]) == (status, state)
    assert ("No crystal came out" in caplog.text) == (status is ExitCode.NOTHING_FOUND)


def test_too_many_failures_end_it_with_their_own_code(tmp_path, caplog):
    with caplog.at_level("INFO", "ssx_mpi"):
        status, done, told = processed(
            1, tmp_path, processor=lambda: MadeStills(n_lattices=lambda i: 0), n_images=400, max_failures=0.5
        )
    assert (status, told["state"]) == (ExitCode.TOO_MANY_FAILURES, "too_many_failures")
    # those in hand are finished
    assert 200 <= len([1 for stage, _ in done[0] if stage == "find_spots"]) <= 264
    assert "Stopped because 200 of 200 hits failed" in caplog.text


def test_with_a_reduction_to_come_it_is_not_done(tmp_path):
    status, _, told = processed(1, tmp_path, all_steps=(*ALL, "reduce"))
    assert (status, told["state"]) == (ExitCode.DONE, "reducing")
    status, _, told = processed(
        1, tmp_path / "none", processor=lambda: MadeStills(n_spots=lambda i: 3), all_steps=(*ALL, "reduce")
    )
    assert told["state"] == "nothing_found"


def test_images_that_could_not_be_read_are_named(tmp_path, caplog):
    _, _, told = processed(1, tmp_path, processor=lambda: MadeStills(fails={"find_spots": {2, 9}}))
    assert told["left_out"] == [["x.nxs:3", "read", "damaged"], ["x.nxs:10", "read", "damaged"]]
    assert "x.nxs:10 left out at read: damaged" in caplog.text


class Sums:
    """Takes the place of what merges crystals as batches finish."""

    def __init__(self):
        self.added, self.folders = [], []

    def nothing(self):
        import numpy as np

        return np.zeros(1)

    def of_batch(self, folder):
        import numpy as np

        self.folders.append(folder.name)
        return np.array([float(folder.name[6:])])

    def add(self, more):
        self.added.append(float(more[0]))
        return None

    def statistics(self):
        return None


def test_batches_of_earlier_starts_are_merged_once_over_all_ranks(tmp_path, monkeypatch):
    processed(1, tmp_path, n_images=8)
    sums: dict[int, Sums] = {}

    def merging(comm, run, geometry):
        return sums.setdefault(comm.rank, Sums())

    monkeypatch.setattr(module, "_live_merge", merging)
    monkeypatch.setattr("ssx_mpi.parallel.communicator.MpiCommunicator.sum", lambda comm, v: sum(comm.allgather(v)))
    processed(3, tmp_path)
    # batches 1 and 2 on their keepers, and on all ranks as one sum; 3 and 4 as they finish
    assert sorted(f for s in sums.values() for f in s.folders) == ["batch_1", "batch_2", "batch_3", "batch_4"]
    assert [s.added[0] for s in sums.values()] == [3.0] * 3
    assert sorted(sums[0].added[1:]) == [3.0, 4.0]
    assert [s.added[1:] for rank, s in sums.items() if rank] == [[], []]


def test_an_outcome_says_why_nothing_came_out():
    lost = Still(1, failures=(Failure("read", "damaged"), Failure("index", "later")))
    assert Outcome.of(lost).failure == "read: damaged"


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "live.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("size", [1, 3])
def test_each_image_has_one_live_line_over_several_starts(tmp_path, size):
    def stopping():
        watch = QuietWatch()
        watch.stopping = lambda: len(watch.worked) >= 3
        return watch

    # the first start writes none: those that it finished are made up for, from batches and from journals
    processed(size, tmp_path, watch=stopping)
    processed(size, tmp_path, watch=stopping, live=True)
    with (tmp_path / "live.jsonl").open("a") as file:
        file.write('{"image": 1')
    processed(size, tmp_path, live=True)
    lines = lines_of(tmp_path)
    assert sorted(line["image"] for line in lines) == list(range(14))
    assert all(line["file-number"] == line["image"] + 1 and line["file"] == "x.nxs" for line in lines)
    assert {len(line["crystals"]) for line in lines} == {1}


def test_without_asking_there_are_no_live_lines_and_how_far_it_is_goes_at_the_end(tmp_path):
    processed(1, tmp_path)
    assert not (tmp_path / "live.jsonl").exists()
    assert not (tmp_path / "progress.json").exists()
