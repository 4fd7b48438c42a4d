"""Which image each rank has in hand, for finding the one that took the process down; and how often each has done so.

Each node has one file, mapped into memory by its ranks, with a slot a rank: noting an image is a write to memory, which
the system carries to the disk when it likes and which a kill cannot undo. The slot has room for what the interpreter
says of a crash; its file descriptor is given to faulthandler. The files are removed when a run ends in order, so that
what is found at the next start was left by one that did not.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ssx_mpi.records.files import storing, write_json

FOLDER = "in_hand"
STRIKES = "crashes.json"
#: an image is set aside when it was in hand at so many crashes of its own, or at so many kills without a word
_MOST_CRASHES, _MOST_KILLS = 2, 3

# a slot begins on a page of its own: image (-1: none), when it was begun (Unix time), rank, asked to stop (0 or 1)
_SLOT = 1 << 16
_HEAD = struct.Struct("<4sqdqq")
_MAGIC = b"SSXH"
_TEXT = 64
_ASKED = struct.Struct("<q")
_ASKED_AT = _HEAD.size - _ASKED.size


@dataclass(frozen=True)
class Note:
    """What a rank had in hand: `image` since `began` (Unix time); `asked` to stop; `last_words` of a crash."""

    image: int
    began: float
    rank: int
    host: str
    asked: bool
    last_words: str


class InHand:
    """The slot of this rank.

    Parameters
    ----------
    directory
        Folder of the run.
    host
        Name of this node.
    slot
        Number of this rank among those of the node.
    rank
        Of this process.
    """

    def __init__(self, directory: Path, host: str, slot: int, rank: int) -> None:
        path = directory / FOLDER / host
        with storing(path):
            path.parent.mkdir(exist_ok=True)
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            # without its blocks on the disk, writing to the map could end the process when the disk is full
            os.posix_fallocate(self.descriptor, slot * _SLOT, mmap.PAGESIZE)
            self._map = mmap.mmap(self.descriptor, mmap.PAGESIZE, offset=slot * _SLOT)
        self._rank = rank
        self._map[:] = bytes(len(self._map))
        self.clear()
        os.lseek(self.descriptor, slot * _SLOT + _TEXT, os.SEEK_SET)

    def note(self, image: int, now: float) -> None:
        """`image` is in hand from `now` (Unix time) on."""
        _HEAD.pack_into(self._map, 0, _MAGIC, image, now, self._rank, 0)

    def asked(self) -> None:
        """This process was asked to stop: its end will not be the fault of its image."""
        _ASKED.pack_into(self._map, _ASKED_AT, 1)

    def last_words(self, text: str) -> None:
        """Why the process ends now."""
        os.write(self.descriptor, text.encode()[: _SLOT - 2 * _TEXT])

    def clear(self) -> None:
        """Nothing is in hand."""
        self.note(-1, 0.0)

    def close(self) -> None:
        self._map.close()
        os.close(self.descriptor)


def read_slot(directory: Path, host: str, slot: int) -> Note | None:
    """What the rank in `slot` of `host` has in hand, None where that cannot be told."""
    try:
        with (directory / FOLDER / host).open("rb") as file:
            return _read_slot(file, host, slot)
    except OSError:
        return None


def _read_slot(file: BinaryIO, host: str, slot: int) -> Note | None:
    file.seek(slot * _SLOT)
    content = file.read(_SLOT)
    if len(content) < _TEXT or not content.startswith(_MAGIC):
        return None
    _, image, began, rank, asked = _HEAD.unpack_from(content)
    words = content[_TEXT:].split(b"\0", 1)[0].decode(errors="replace")
    return Note(image, began, rank, host, bool(asked), words) if image >= 0 else None


def left_behind(directory: Path) -> list[Note]:
    """What was in hand when the last run ended, if it did not end in order."""
    notes = []
    for path in sorted((directory / FOLDER).glob("*")):
        with path.open("rb") as file:
            slots = range(-(-path.stat().st_size // _SLOT))
            notes += [note for s in slots if (note := _read_slot(file, path.name, s)) is not None]
    return notes


def remove(directory: Path) -> None:
    """Forget what was in hand: the run ended in order, or its notes were taken over into the strikes."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


@dataclass(frozen=True)
class Strike:
    """One end of the process with an image in hand; `reason` is empty for a kill without a word."""

    began: float
    rank: int
    host: str
    reason: str


def _strike(content: dict[str, Any]) -> Strike:
    """A strike of its plain data; members that are not known here are those of another version."""
    return Strike(float(content["began"]), int(content["rank"]), str(content["host"]), str(content["reason"]))


def reason_of(last_words: str) -> str:
    """The cause of a crash in a few words, from what the interpreter or we wrote."""
    first, _, _ = last_words.strip().partition("\n")
    if first.startswith("Timeout"):
        return "hung in a library"
    return first.removeprefix("Fatal Python error: ")[:120]


def strikes_of(notes: list[Note]) -> dict[int, Strike]:
    """The images among `notes` that may have ended the process.

    A crash names itself. Where there is none, one process was killed from outside, for the memory that it took
    perhaps: the one that was not asked to stop, while the launcher asked the others.
    """
    crashed = [n for n in notes if n.last_words]
    if not crashed and (len(notes) == 1 or any(n.asked for n in notes)):
        crashed = [n for n in notes if not n.asked]
    return {n.image: Strike(n.began, n.rank, n.host, reason_of(n.last_words)) for n in crashed}


class Strikes:
    """How often each image was in hand when the process ended, kept in ``crashes.json``; rank 0 alone writes it."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STRIKES
        self.of_image: dict[int, list[Strike]] = {}
        #: what is to be said of a damaged file, which counts as none
        self.damage = ""
        try:
            if self._path.exists():
                content = json.loads(self._path.read_bytes())
                self.of_image = {int(i): [_strike(s) for s in strikes] for i, strikes in content.items()}
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            self.damage = f"{self._path} is damaged: images that ended earlier starts are tried again"

    def add(self, found: dict[int, Strike]) -> None:
        """Count what an earlier run left; the same find counts once."""
        for image, strike in found.items():
            known = self.of_image.setdefault(image, [])
            if strike not in known:
                known.append(strike)
        if found:
            content = {str(i): [asdict(s) for s in strikes] for i, strikes in sorted(self.of_image.items())}
            write_json(self._path, content)

    @property
    def set_aside(self) -> dict[int, str]:
        """Images that are not tried again, and why."""
        return {image: reason for image, strikes in self.of_image.items() if (reason := _verdict(strikes))}


def _verdict(strikes: list[Strike]) -> str:
    crashes = [s.reason for s in strikes if s.reason]
    if len(crashes) >= _MOST_CRASHES:
        return f"ended the process {len(crashes)} times: {crashes[-1]}"
    if len(strikes) >= _MOST_KILLS:
        return f"in hand each of {len(strikes)} times that the process was killed"
    return ""
