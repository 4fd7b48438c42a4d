"""The journal keeps every whole record through a kill at any byte, and belongs to one run only."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from dials.array_family import flex
from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.records.joined_tables import take_apart
from ssx_mpi.records.journal import _FRAME, DamagedJournalError, Journal, decode, encode, identity_of

IDENTITY = {"run": "abc", "steps": ["find_spots"]}


def record(image: int) -> bytes:
    """A record with two tables, of sizes that depend on the image."""
    strong = flex.reflection_table()
    strong["intensity"] = flex.double(np.arange(image + 2) * 1.5)
    indexed = flex.reflection_table()
    indexed["id"] = flex.int(range(image + 1))
    tables = {name: take_apart(t.as_msgpack()) for name, t in (("strong", strong), ("indexed", indexed))}
    return encode(image, {"numbers": {"image": image, "name": f"x_{image}.cbf"}}, tables)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "batch_1" / "journal"


@pytest.fixture
def opened(path):
    """Opens the journal as the next run would."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(Journal(path, IDENTITY)))


def fill(path, images) -> list[int]:
    """Write a journal; returns where each record ends."""
    journal, ends = Journal(path, IDENTITY), [path.stat().st_size]
    for image in images:
        journal.append(record(image))
        ends.append(path.stat().st_size)
    journal.close()
    return ends


def intensities(journal: Journal, image: int) -> list[float]:
    entry = journal.entries[image]
    return np.frombuffer(journal.column(entry, entry.tables["strong"].columns["intensity"])).tolist()


def test_what_was_appended_is_read_back(path, opened):
    fill(path, [3, 0, 7])
    journal = opened()
    assert list(journal.entries) == [3, 0, 7]
    for image in (3, 0, 7):
        assert journal.entries[image].content == {"numbers": {"image": image, "name": f"x_{image}.cbf"}}
        assert intensities(journal, image) == [1.5 * k for k in range(image + 2)]
        indexed = journal.entries[image].tables["indexed"]
        ids = np.frombuffer(journal.column(journal.entries[image], indexed.columns["id"]), np.int32)
        assert ids.tolist() == list(range(image + 1))


def test_cut_at_any_byte_every_whole_record_stays(path):
    ends = fill(path, [0, 1, 2])
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        journal = Journal(path, IDENTITY)
        whole = sum(length >= end for end in ends[1:])
        assert list(journal.entries) == list(range(whole)), length
        # and it goes on from there
        journal.append(record(9))
        journal.close()
        again = Journal(path, IDENTITY)
        assert list(again.entries) == [*range(whole), 9]
        assert all(intensities(again, i) == [1.5 * k for k in range(i + 2)] for i in again.entries)
        again.close()


@pytest.mark.parametrize("where", ["magic", "lengths", "header", "blob"])
def test_a_damaged_record_costs_that_record_alone(path, opened, where):
    ends = fill(path, [0, 1, 2])
    content = bytearray(path.read_bytes())
    at = {
        "magic": ends[1],
        "lengths": ends[1] + 9,
        "header": ends[1] + _FRAME.size + 5,
        "blob": ends[2] - 1,
    }[where]
    content[at] ^= 0xFF
    path.write_bytes(content)
    journal = opened()
    assert (list(journal.entries), journal.n_damaged) == ([0, 2], 1)
    assert intensities(journal, 2) == [0.0, 1.5, 3.0, 4.5]
    assert path.stat().st_size == ends[3]
    # done again, it is found behind the others
    journal.append(record(1))
    again = opened()
    assert (list(again.entries), again.n_damaged) == ([0, 2, 1], 1)
    assert intensities(again, 1) == [0.0, 1.5, 3.0]


def test_a_damaged_last_record_is_cut_off(path, opened):
    ends = fill(path, [0, 1, 2])
    content = bytearray(path.read_bytes())
    content[ends[2] + 2] ^= 0xFF
    path.write_bytes(content)
    journal = opened()
    assert (list(journal.entries), journal.n_damaged) == ([0, 1], 0)
    assert path.stat().st_size == ends[2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40)), min_size=1, max_size=3)
)
def test_whatever_is_damaged_the_records_elsewhere_stay(damages):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        ends = fill(path, range(4))
        content = bytearray(path.read_bytes())
        touched = set()
        for place, new in damages:
            at = ends[0] + int(place * (len(content) - ends[0]))
            content[at : at + len(new)] = new[: len(content) - at]
            touched |= {k for k in range(4) if at < ends[k + 1] and at + len(new) > ends[k]}
        path.write_bytes(content)
        with contextlib.closing(Journal(path, IDENTITY)) as journal:
            assert set(journal.entries) >= set(range(4)) - touched
            assert all(intensities(journal, i) == [1.5 * k for k in range(i + 2)] for i in journal.entries)


def test_a_magic_that_two_chunks_share_is_found(path, opened, monkeypatch):
    ends = fill(path, [0, 1])
    content = bytearray(path.read_bytes())
    content[ends[0]] ^= 0xFF
    path.write_bytes(content)
    monkeypatch.setattr("ssx_mpi.records.journal._CHUNK", ends[1] - ends[0] + 1)
    assert list(opened().entries) == [1]


def test_an_image_keeps_its_first_record(path, opened):
    fill(path, [4])
    size = path.stat().st_size
    journal = opened()
    other = encode(4, {"numbers": "other"}, {})
    assert journal.append(other).content["numbers"]["name"] == "x_4.cbf"
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    "other", [{"run": "abd", "steps": ["find_spots"]}, {"run": "abc", "steps": ["index"]}, {"run": "abc"}]
)
def test_another_runs_journal_is_refused_and_left_as_it_is(path, other):
    fill(path, [1, 2])
    content = path.read_bytes()
    with pytest.raises(ValueError, match="other parameters"):
        Journal(path, other)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"notes of a user\n", b"[1]\n", bytes(70000), b"\xff\xfe\n", b"x" * 70000])
def test_any_other_file_is_refused_and_left_as_it_is(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    for look in (lambda: Journal(path, IDENTITY), lambda: identity_of(path)):
        with pytest.raises(DamagedJournalError, match="journal is damaged at its beginning"):
            look()
    assert path.read_bytes() == content


def test_a_newer_form_is_named(path):
    path.parent.mkdir()
    path.write_text(json.dumps({**IDENTITY, "version": 2}) + "\n")
    with pytest.raises(DamagedJournalError, match=r"form \(version 2\)"):
        identity_of(path)


def test_a_journal_says_whose_it_is(path):
    assert identity_of(path) is None
    fill(path, [1])
    assert identity_of(path) == IDENTITY
    path.write_bytes(path.read_bytes()[:10])
    assert identity_of(path) is None


def test_a_record_can_be_read_without_a_journal():
    packed = record(5)
    entry = decode(packed)
    column = entry.tables["strong"].columns["intensity"]
    at = entry.start + column.offset
    assert np.frombuffer(packed[at : at + column.n_bytes]).tolist() == [1.5 * k for k in range(7)]
