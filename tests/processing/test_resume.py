"""What earlier starts left of a batch, and what is still to do, whatever the number of ranks."""

from __future__ import annotations

import json
import shutil

import pytest
from fake_ranks import on_fake_ranks, outcomes_on_fake_ranks
from made_stills import COMMON, MadeStills

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.resume import BatchKeeping, check_steps, finish_batch, survey
from ssx_mpi.records.batch_files import IMAGES, SUMMARY, batches, read_summary

IDENTITY = {"run": "abc"}
ALL = ("find_spots", "index", "integrate")
SPOTS = ("find_spots",)


def kept_in(folder, size=1, n_images=14, keep_intermediate=True, identity=IDENTITY):
    return BatchKeeping(batches(folder, n_images, 4), 4, identity, COMMON, keep_intermediate, size)


def begin(keeping, number, images, steps=ALL, processor=None):
    """Journal some images of a batch, as a run does that is killed then."""
    processor = processor or MadeStills()
    records = keeping.records(number, steps)
    for image in images:
        still = processor.find_spots(image)
        if "index" in steps:
            still = processor.index(still)
        if "integrate" in steps:
            still = processor.integrate(still)
        records.add(processor.record(still, steps, COMMON))
    return records


def do(keeping, number, steps=ALL, done=(), processor=None):
    """Do a batch to its end."""
    batch = keeping.batches[number - 1]
    return finish_batch(begin(keeping, number, range(batch.first, batch.stop), steps, processor), done + steps)


def test_every_image_has_a_batch_and_every_batch_a_keeper(tmp_path):
    keeping = kept_in(tmp_path, size=3)
    assert [keeping.number_of(image) for image in (0, 3, 4, 13)] == [1, 1, 2, 4]
    # the coordinator last
    assert [keeping.keeper(number) for number in range(1, 8)] == [2, 1, 0, 2, 1, 0, 2]
    assert {kept_in(tmp_path, size=1).keeper(number) for number in range(1, 5)} == {0}


def test_a_new_run_has_all_to_do(tmp_path):
    found = survey(SerialCommunicator(), kept_in(tmp_path), ALL)
    assert found.pending == [(0, 4), (4, 8), (8, 12), (12, 14)]
    assert found.steps == dict.fromkeys((1, 2, 3, 4), ALL)
    assert found.done == dict.fromkeys((1, 2, 3, 4), ())
    assert (found.finished, found.records) == ([], {})


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_all_ranks_know_what_is_to_do_and_each_holds_its_own_journals(tmp_path, size):
    before = kept_in(tmp_path)
    news = do(before, 2)
    begin(before, 1, [1, 2]).close()
    begin(before, 4, [13]).close()

    def on_rank(comm):
        keeping = kept_in(tmp_path, size)
        found = survey(comm, keeping, ALL)
        for records in found.records.values():
            records.close()
        assert all(keeping.keeper(number) == comm.rank for number in found.records)
        return found.pending, found.steps, [n.number for n in found.finished], found.finished, sorted(found.records)

    results = on_fake_ranks(size, on_rank)
    for pending, steps, finished, of, _ in results:
        assert pending == [(0, 1), (3, 4), (8, 12), (12, 13)]
        assert steps == dict.fromkeys((1, 3, 4), ALL)
        assert finished == [2]
        assert of[0].statistics.as_json() == news.statistics.as_json()
    assert sorted(number for *_, own in results for number in own) == [1, 4]


def test_images_that_were_left_out_are_named_again(tmp_path):
    keeping = kept_in(tmp_path)
    lost = MadeStills(fails={"find_spots": {5}, "integrate": {6}})
    news = do(keeping, 2, processor=lost)
    # a lattice that could not be integrated is no lost image
    assert news.bad_images == [("x.nxs:6", "read", "damaged")]
    assert news.number == 2
    assert (news.statistics.counts["images"], news.statistics.counts["crystals"]) == (4, 2)
    again = survey(SerialCommunicator(), keeping, ALL).finished
    assert [n.bad_images for n in again] == [news.bad_images]


def test_no_more_than_some_bad_images_are_named(tmp_path):
    keeping = BatchKeeping(batches(tmp_path, 120, 120), 120, IDENTITY, COMMON, True, 1)
    news = do(keeping, 1, processor=MadeStills(fails={"find_spots": set(range(120))}))
    assert len(news.bad_images) == 50
    assert news.bad_images[49][0] == "x.nxs:50"
    assert news.statistics.failures["read: damaged"] == 120


class TestKilled:
    """A kill at any moment leaves something that goes on."""

    def test_between_the_last_record_and_the_files(self, tmp_path):
        keeping = kept_in(tmp_path)
        begin(keeping, 1, range(4)).close()
        found = survey(SerialCommunicator(), keeping, ALL)
        assert [n.number for n in found.finished] == [1]
        assert (1 in found.steps, found.pending[0]) == (False, (4, 8))
        assert read_summary(keeping.batches[0], IDENTITY)["steps"] == list(ALL)
        assert (tmp_path / "batch_1" / "integrated_1.refl").exists()
        assert not (tmp_path / "batch_1" / "journal").exists()

    def test_between_the_summary_and_the_removal_of_the_journal(self, tmp_path):
        keeping = kept_in(tmp_path)
        begin(keeping, 1, range(4)).close()
        shutil.copy(tmp_path / "batch_1" / "journal", tmp_path / "kept")
        do(keeping, 1)
        shutil.copy(tmp_path / "kept", tmp_path / "batch_1" / "journal")
        assert [n.number for n in survey(SerialCommunicator(), keeping, ALL).finished] == [1]
        assert not (tmp_path / "batch_1" / "journal").exists()

    def test_so_too_with_more_steps_to_do(self, tmp_path):
        keeping = kept_in(tmp_path)
        begin(keeping, 1, range(4), SPOTS).close()
        shutil.copy(tmp_path / "batch_1" / "journal", tmp_path / "kept")
        do(keeping, 1, SPOTS)
        shutil.copy(tmp_path / "kept", tmp_path / "batch_1" / "journal")
        found = survey(SerialCommunicator(), keeping, ALL)
        assert found.steps[1] == ("index", "integrate")
        assert found.done[1] == SPOTS
        assert found.pending[0] == (0, 4)
        assert not (tmp_path / "batch_1" / "journal").exists()

    def test_within_a_record(self, tmp_path):
        keeping = kept_in(tmp_path)
        begin(keeping, 1, range(3)).close()
        journal = tmp_path / "batch_1" / "journal"
        journal.write_bytes(journal.read_bytes()[:-5])
        found = survey(SerialCommunicator(), keeping, ALL)
        assert found.pending[0] == (2, 4)
        assert found.records[1].missing == [(2, 4)]
        found.records[1].close()


class TestSteps:
    """Steps one by one."""

    def test_what_is_done_is_not_done_again(self, tmp_path):
        keeping = kept_in(tmp_path, n_images=4)
        do(keeping, 1, SPOTS)
        found = survey(SerialCommunicator(), keeping, ("index",))
        assert (found.steps, found.done, found.pending) == ({1: ("index",)}, {1: SPOTS}, [(0, 4)])
        assert survey(SerialCommunicator(), keeping, SPOTS).finished[0].number == 1

    @pytest.mark.parametrize("steps", [("index",), ("integrate",), ("index", "integrate")])
    def test_a_step_needs_the_one_before(self, tmp_path, steps):
        keeping = kept_in(tmp_path, size=3)
        do(keeping, 1, SPOTS)
        if steps == ("integrate",):
            named = "batch 1 "
        else:
            named = "batch 2 "
            do(keeping, 4, SPOTS)
        said = f"steps={steps[0]}: {named}"
        before = {"index": "find_spots", "integrate": "index"}[steps[0]]
        for ask in (
            lambda comm: survey(comm, kept_in(tmp_path, 3), steps),
            lambda comm: check_steps(comm, keeping.batches, IDENTITY, steps),
        ):
            errors = outcomes_on_fake_ranks(3, ask)
            assert {type(error) for error in errors} == {InputError}
            assert len({str(error) for error in errors}) == 1
            assert f"has no results of {before} yet" in str(errors[0])
        alone = outcomes_on_fake_ranks(1, lambda comm: check_steps(comm, keeping.batches, IDENTITY, steps))
        assert str(alone[0]).startswith(said)

    def test_with_all_that_is_needed_they_are_found_good(self, tmp_path):
        keeping = kept_in(tmp_path)
        for number in range(1, 5):
            do(keeping, number, SPOTS)
        assert on_fake_ranks(3, lambda comm: check_steps(comm, keeping.batches, IDENTITY, ("index",))) == [None] * 3

    def test_a_batch_begun_with_other_steps_is_refused(self, tmp_path):
        keeping = kept_in(tmp_path)
        begin(keeping, 2, [4], SPOTS).close()
        with pytest.raises(InputError, match=r"steps=find_spots\+index\+integrate: batch 2 .* with steps=find_spots"):
            survey(SerialCommunicator(), keeping, ALL)
        # and going on with the same is not
        found = survey(SerialCommunicator(), keeping, SPOTS)
        assert found.pending == [(0, 4), (5, 8), (8, 12), (12, 14)]
        found.records[2].close()

    def test_results_of_other_parameters_are_none(self, tmp_path):
        do(kept_in(tmp_path), 1)
        other = kept_in(tmp_path, identity={"run": "other"})
        assert survey(SerialCommunicator(), other, ALL).finished == []

    def test_a_journal_of_other_parameters_is_refused(self, tmp_path):
        begin(kept_in(tmp_path), 1, [0]).close()
        other = kept_in(tmp_path, identity={"run": "other"})
        with pytest.raises(InputError, match=r"belongs to a run with other parameters.*use restart=True"):
            survey(SerialCommunicator(), other, ALL)


class TestDamaged:
    """Files that are not what was written: the file is named, and no more lost than it held."""

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"identity": 1}', "\0" * 50, '{"identity": {"run": "abc"}, "left_out": [1]}']
    )
    def test_a_summary_costs_its_batch(self, tmp_path, caplog, content):
        do(kept_in(tmp_path), 2)
        do(kept_in(tmp_path), 3)
        (tmp_path / "batch_2" / SUMMARY).write_text(content)
        found = on_fake_ranks(3, lambda comm: survey(comm, kept_in(tmp_path, 3), ALL))
        assert {str(each.pending) for each in found} == {"[(0, 4), (4, 8), (12, 14)]"}
        (said,) = found[0].notes
        assert f"{tmp_path}/batch_2/batch.json is damaged" in said
        assert "batch 2 is done again" in said
        assert caplog.messages == [said]
        # a later step cannot go on with it
        with pytest.raises(InputError, match=r"batch_2/batch\.json is damaged.*begin with find_spots"):
            check_steps(SerialCommunicator(), kept_in(tmp_path).batches[1:2], IDENTITY, ("index",))

    def test_numbers_within_a_summary(self, tmp_path):
        do(kept_in(tmp_path), 2)
        path = tmp_path / "batch_2" / SUMMARY
        path.write_text(path.read_text().replace('"histograms"', '"histo"'))
        found = survey(SerialCommunicator(), kept_in(tmp_path), ALL)
        assert (4, 8) in found.pending
        assert "batch.json is damaged" in found.notes[0]

    def test_the_first_line_of_a_journal_costs_the_journal(self, tmp_path):
        keeping = kept_in(tmp_path)
        begin(keeping, 1, [0, 1]).close()
        begin(keeping, 2, [4, 5]).close()
        journal = tmp_path / "batch_1" / "journal"
        journal.write_bytes(b"\xff" * 8 + journal.read_bytes()[8:])
        found = survey(SerialCommunicator(), keeping, ALL)
        assert found.pending[:2] == [(0, 4), (6, 8)]
        assert found.notes == [
            f"{journal} is damaged at its beginning: the images of batch 1 are done again (journal.damaged keeps it)"
        ]
        assert not journal.exists()
        found.records[2].close()

    def test_a_record_costs_its_image(self, tmp_path):
        keeping = kept_in(tmp_path)
        begin(keeping, 1, [0, 1, 2]).close()
        journal = tmp_path / "batch_1" / "journal"
        content = bytearray(journal.read_bytes())
        content[content.index(b"SSXR", content.index(b"SSXR") + 1) + 60] ^= 0xFF
        journal.write_bytes(content)
        found = survey(SerialCommunicator(), keeping, ALL)
        assert found.pending[:2] == [(1, 2), (3, 4)]
        assert found.notes == [f"{journal} has a damaged record: those images are done again"]
        found.records[1].close()

    def test_reflections_of_another_dials_are_not_mixed(self, tmp_path, monkeypatch):
        keeping = kept_in(tmp_path)
        begin(keeping, 1, range(4)).close()
        monkeypatch.setattr("ssx_mpi.dials_compat.table_version", lambda: 9)
        found = survey(SerialCommunicator(), keeping, ALL)
        assert found.pending[0] == (0, 4)
        assert "its 4 images are done again" in found.notes[0]
        assert not (tmp_path / "batch_1" / "journal").exists()


def test_files_of_a_batch_say_what_is_in_it(tmp_path):
    keeping = kept_in(tmp_path, n_images=6)
    do(keeping, 2)
    summary = json.loads((tmp_path / "batch_2" / SUMMARY).read_text())
    assert (summary["first"], summary["stop"], summary["steps"]) == (4, 6, list(ALL))
    assert summary["statistics"]["counts"]["crystals"] == 2
    assert [n["image"] for n in json.loads((tmp_path / "batch_2" / IMAGES).read_text())] == [4, 5]


def test_intermediate_results_are_written_where_they_are_wanted(tmp_path):
    do(kept_in(tmp_path, keep_intermediate=False), 1)
    assert sorted(p.name for p in (tmp_path / "batch_1").glob("*.refl")) == ["integrated_1.refl"]
    do(kept_in(tmp_path), 2)
    assert sorted(p.name for p in (tmp_path / "batch_2").glob("*.refl")) == [
        "indexed.refl",
        "integrated_1.refl",
        "strong.refl",
    ]
