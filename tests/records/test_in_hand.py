"""Which image is blamed for the end of a process."""

import faulthandler
import json

import pytest

from ssx_mpi.records import in_hand
from ssx_mpi.records.in_hand import InHand, Note, Strike, Strikes, left_behind, strikes_of


def note(image, words="", asked=False, rank=0):
    return Note(image, 100.0 + image, rank, "node1", asked, words)


def test_what_ranks_have_in_hand_is_found_after_they_are_gone(tmp_path):
    slots = [InHand(tmp_path, "node1", slot, rank=slot + 4) for slot in range(3)]
    slots[0].note(17, 5.0)
    slots[1].note(18, 6.0)
    slots[1].asked()
    faulthandler.dump_traceback(file=slots[0].descriptor, all_threads=False)
    found = left_behind(tmp_path)
    assert [(n.image, n.began, n.rank, n.host, n.asked) for n in found] == [
        (17, 5.0, 4, "node1", False),
        (18, 6.0, 5, "node1", True),
    ]
    assert "test_in_hand.py" in found[0].last_words
    assert in_hand.read_slot(tmp_path, "node1", 1) == found[1]
    assert in_hand.read_slot(tmp_path, "node2", 1) is None
    slots[0].clear()
    assert [n.image for n in left_behind(tmp_path)] == [18]
    in_hand.remove(tmp_path)
    assert left_behind(tmp_path) == []
    for slot in slots:
        slot.close()


def test_a_crash_is_blamed_and_what_the_others_had_in_hand_is_not():
    notes = [note(1), note(2, "Fatal Python error: Segmentation fault\n\n stack"), note(3, asked=True)]
    assert {i: s.reason for i, s in strikes_of(notes).items()} == {2: "Segmentation fault"}


def test_of_a_kill_the_rank_that_was_not_asked_is_suspected():
    assert set(strikes_of([note(1, asked=True), note(2), note(3, asked=True)])) == {2}
    assert set(strikes_of([note(7)])) == {7}


def test_the_loss_of_everything_at_once_blames_nobody():
    assert strikes_of([note(1), note(2), note(3)]) == {}


def test_an_image_has_a_second_trial_and_after_kills_a_third(tmp_path):
    for trial in range(3):
        strikes = Strikes(tmp_path)
        crash = {5: in_hand.Strike(float(trial), 0, "node1", "Aborted")}
        kill = {6: in_hand.Strike(float(trial), 0, "node1", "")}
        strikes.add({**crash, **kill})
        # found twice, because a kill came before the notes could be removed
        strikes.add(crash)
        aside = Strikes(tmp_path).set_aside
        assert (5 in aside, 6 in aside) == (trial >= 1, trial >= 2)
    assert aside[5] == "ended the process 3 times: Aborted"


def test_a_hang_is_told_from_a_crash():
    assert in_hand.reason_of("Timeout (0:00:12)!\nThread 0x1 (most recent call first):") == "hung in a library"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"x": []}', b'{"1": [{"began": 1}]}', b"\xff", b'{"1": 3}'])
def test_a_damaged_list_of_crashes_is_named_and_begun_anew(tmp_path, content):
    path = tmp_path / "crashes.json"
    path.write_bytes(content)
    strikes = Strikes(tmp_path)
    assert strikes.of_image == {}
    assert strikes.damage == f"{path} is damaged: images that ended earlier starts are tried again"
    strikes.add({7: Strike(1.0, 0, "node", "Segmentation fault")})
    assert (list(Strikes(tmp_path).of_image), Strikes(tmp_path).damage) == ([7], "")


def test_members_that_another_version_added_do_not_matter(tmp_path):
    kept = {"began": 1.0, "rank": 0, "host": "node", "reason": "", "newer": 3}
    (tmp_path / "crashes.json").write_text(json.dumps({"7": [kept]}))
    assert Strikes(tmp_path).of_image == {7: [Strike(1.0, 0, "node", "")]}
