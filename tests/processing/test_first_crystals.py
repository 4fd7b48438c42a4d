"""The first hits and crystals: as many as are wanted, the same ones on any number of ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fake_mpi import on_simulated_ranks
from fake_ranks import on_fake_ranks
from made_stills import MadeStills, QuietWatch, spots_table

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.run_parameters import CrystalSelection
from ssx_mpi.processing.first_crystals import (
    FirstCrystals,
    FirstHits,
    SearchedImages,
    find_first_crystals,
    find_first_hits,
    tells_centre,
)
from ssx_mpi.processing.watch import ImageAbandoned
from ssx_mpi.stages.fast.beam_search import MIN_SPOTS
from ssx_mpi.stages.still_results import Spots, Still


def a_run(watch=None, n_images=100, processor=None, first=None, last=None, n_crystals=10):
    selection = CrystalSelection(n_crystals, first, last)
    return SimpleNamespace(
        watch=watch or QuietWatch(),
        images=range(n_images),
        parameters=SimpleNamespace(geometry=selection),
        processor=lambda geometry=None: processor,
    )


def every_third(image: int) -> int:
    """Lattices: none, one, two, none, one, two ..."""
    return image % 3


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(("wanted", "end"), [(1, 2), (3, 3), (4, 5), (30, 30), (98, 99)])
def test_the_first_images_with_enough_lattices_count_whoever_did_them(size, wanted, end):
    def on_rank(comm, clock):
        run = a_run(processor=MadeStills(n_lattices=every_third))
        selection = CrystalSelection(wanted, None, None)
        found = find_first_crystals(comm, run, selection, run.processor(), "crystals")
        assert run.watch.waits >= 1
        return found.end, found.stopped, {i: s.n_lattices for i, s in found.crystals.stills.items()}

    results, _ = on_simulated_ranks(size, on_rank, seed=wanted)
    assert {(found_end, stopped) for found_end, stopped, _ in results} == {(end, False)}
    together = {image: n for _, _, own in results for image, n in own.items()}
    assert together == {image: image % 3 for image in range(end)}


def test_with_too_few_all_images_are_looked_at():
    run = a_run(n_images=12, processor=MadeStills(n_lattices=every_third))
    found = find_first_crystals(
        SerialCommunicator(), run, CrystalSelection(99, None, None), run.processor(), "crystals"
    )
    assert (found.end, found.stopped, len(found.crystals.stills)) == (12, False, 12)


def test_just_the_images_of_a_selection_are_looked_at():
    processor = MadeStills()
    run = a_run(processor=processor)
    found = find_first_crystals(SerialCommunicator(), run, CrystalSelection(99, 11, 14), processor, "crystals")
    assert sorted(found.crystals.stills) == [10, 11, 12, 13]
    assert found.end == 14


def test_a_request_to_stop_ends_it():
    watch = QuietWatch()
    processor = MadeStills()
    index = processor.index
    processor.index = lambda still: (watch.ask("please") if still.image == 3 else None, index(still))[1]
    found = find_first_crystals(
        SerialCommunicator(), a_run(watch, processor=processor), CrystalSelection(50, None, None), processor, "crystals"
    )
    assert found.stopped
    assert sorted(found.crystals.stills) == [0, 1, 2, 3]


def test_spots_that_were_searched_are_not_found_again():
    processor = MadeStills(n_lattices=every_third)
    searched = {image: processor.find_spots(image).without_experiment() for image in range(9)}
    processor.done.clear()
    run = a_run(processor=processor)
    selection = CrystalSelection(13, None, None)
    found = find_first_crystals(
        SerialCommunicator(), run, selection, processor, "crystals", SearchedImages(searched, 9)
    )
    # nine images have nine lattices; four more are wanted
    assert [image for stage, image in processor.done if stage == "again"] == list(range(9))
    assert [image for stage, image in processor.done if stage == "find_spots"] == [9, 10, 11, 12, 13]
    assert found.end == 14
    assert {i: s.n_lattices for i, s in found.crystals.stills.items()} == {i: i % 3 for i in range(14)}


@pytest.mark.parametrize("wanted", [1, 8, 9])
def test_enough_lattices_among_what_was_searched_end_it_there(wanted):
    processor = MadeStills(n_lattices=every_third)
    searched = {image: processor.find_spots(image).without_experiment() for image in range(9)}
    processor.done.clear()
    found = find_first_crystals(
        *(SerialCommunicator(), a_run(processor=processor), CrystalSelection(wanted, None, None), processor, "x"),
        SearchedImages(searched, 9),
    )
    assert found.end == {1: 2, 8: 9, 9: 9}[wanted]
    assert sorted(found.crystals.stills) == list(range(found.end))
    assert not [image for stage, image in processor.done if stage == "find_spots"]


def test_a_stop_while_it_is_indexed_again_begins_no_other_image():
    watch, processor = QuietWatch(), MadeStills()
    searched = {image: processor.find_spots(image).without_experiment() for image in range(4)}
    processor.done.clear()
    again = processor.index_again
    processor.index_again = lambda still: (watch.ask("please"), again(still))[1]
    found = find_first_crystals(
        *(SerialCommunicator(), a_run(watch, processor=processor), CrystalSelection(50, None, None), processor, "x"),
        SearchedImages(searched, 4),
    )
    assert found.stopped is True
    assert [image for stage, image in processor.done if stage == "again"] == [0]
    assert not [image for stage, image in processor.done if stage == "find_spots"]


@pytest.mark.parametrize("size", [1, 3])
def test_hits_that_can_tell_the_centre_are_found_in_order(size):
    def on_rank(comm, clock):
        processor = MadeStills(n_spots=lambda image: MIN_SPOTS if image % 2 else MIN_SPOTS - 1)
        job, end, stopped = find_first_hits(comm, a_run(processor=processor, n_crystals=99), 7)
        kept = job.before(end)
        assert all(still.spots.frame is None for still in kept.values())
        assert all((still.spots.experiment is not None) == bool(image % 2) for image, still in kept.items())
        return sorted(job.hits(end)), sorted(kept), end, stopped

    results, _ = on_simulated_ranks(size, on_rank)
    assert {(end, stopped) for *_, end, stopped in results} == {(14, False)}
    assert sorted(i for hits, *_ in results for i in hits) == list(range(1, 14, 2))
    assert sorted(i for _, kept, *_ in results for i in kept) == list(range(14))


def test_a_hit_needs_enough_spots_and_their_table():
    assert tells_centre(Still(0, Spots(MIN_SPOTS, True, spots_table(MIN_SPOTS))))
    assert not tells_centre(Still(0, Spots(MIN_SPOTS - 1, True, spots_table(MIN_SPOTS - 1))))
    assert not tells_centre(Still(0, Spots(MIN_SPOTS, True)))


def test_an_image_that_takes_too_long_is_a_failure_and_one_that_is_set_aside_is_not_begun():
    class Impatient(QuietWatch):
        def image(self, image, work):
            if image == 1:
                raise ImageAbandoned
            return super().image(image, work)

    watch = Impatient(set_aside={2: "ended the process twice"})
    job = FirstCrystals(SerialCommunicator(), MadeStills(), watch, lambda done: None)
    assert job.work(0, lambda: None)[0] == 1
    value, still = job.work(1, lambda: None)
    assert (value, [(f.stage, f.reason) for f in still.failures]) == (
        0,
        [("timeout", "took longer than image_timeout")],
    )
    value, still = job.work(2, lambda: None)
    assert (value, [(f.stage, f.reason) for f in still.failures]) == (0, [("crash", "ended the process twice")])
    assert watch.worked == [0]
    # abandoned because all is to stop, it is as if it had never been begun
    watch.ask("stop")
    assert job.work(1, lambda: None) is None
    hits = FirstHits(SerialCommunicator(), MadeStills(), watch, lambda done: None)
    assert hits.work(1, lambda: None) is None


def test_a_rank_breathes_between_spots_and_indexing():
    watch, breaths = QuietWatch(), []
    job = FirstCrystals(SerialCommunicator(), MadeStills(), watch, lambda done: None)
    job.work(0, lambda: breaths.append(1))
    assert (watch.breaths, breaths) == (1, [1])


def test_hits_are_indexed_again_with_another_geometry_and_blanks_are_not():
    first, second = MadeStills(n_spots=lambda image: 5 if image == 1 else 40), MadeStills(edge=80.0)
    job = FirstCrystals(SerialCommunicator(), first, QuietWatch(), lambda done: None)
    for image in (2, 0, 1):
        job.keep(image, job.work(image, lambda: None)[1])
    job.index_again(second)
    assert [image for stage, image in second.done if stage == "again"] == [0, 2]
    assert {i: s.n_lattices for i, s in job.stills.items()} == {0: 1, 1: 0, 2: 1}
    assert job.stills[0].indexed.lattices[0].cell[0] == 80.0
    assert job.processor is second


def test_what_was_known_stays_when_it_is_abandoned():
    class Impatient(QuietWatch):
        def image(self, image, work):
            self.ask("stop")
            raise ImageAbandoned

    job = FirstCrystals(SerialCommunicator(), MadeStills(), QuietWatch(), lambda done: None)
    job.keep(0, job.work(0, lambda: None)[1])
    before = job.stills[0]
    job.watch = Impatient()
    job.index_again(MadeStills(edge=80.0))
    assert job.stills[0] is before


def test_lattices_and_numbers_of_all_ranks_come_together_in_order():
    def on_rank(comm):
        job = FirstCrystals(comm, MadeStills(n_lattices=every_third), QuietWatch(), lambda done: None)
        # dealt out backwards
        for image in range(8):
            if (7 - image) % comm.size == comm.rank:
                job.keep(image, job.work(image, lambda: None)[1])
        statistics, packed = job.statistics(comm), job.gather_lattices(comm)
        return statistics.counts, None if packed is None else [(image, len(p["experiment"])) for image, p, _ in packed]

    for size in (1, 3):
        results = on_fake_ranks(size, on_rank)
        counts, packed = results[0]
        assert packed == [(image, image % 3) for image in range(8) if image % 3]
        assert (counts["images"], counts["hits"], counts["lattices"], counts["indexed"]) == (8, 8, 7, 5)
        assert all(packed is None for _, packed in results[1:])


def test_each_rank_keeps_its_own_and_shows_how_far_it_is():
    shown = []
    job = FirstHits(SimpleNamespace(rank=4), MadeStills(), QuietWatch(), shown.append)
    job.progress(17)
    assert (job.keeper(3), shown, job.note(2), job.name_of(6)) == (4, [17], 2, "x.nxs:7")
