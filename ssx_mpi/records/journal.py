"""The journal of a batch: what is finished, appended image by image, intact after a kill at any moment.

A journal is one file. It begins with a line of JSON that says what it belongs to; then come the records of images in
the order in which they were finished. A record is a frame (magic, two lengths, checksum), a MessagePack header with
the numbers of the image and the layout of its tables, and the bytes of their columns. A record that was cut short by a
kill is the last one, is recognised by its length or checksum, and is cut off when the journal is opened again. One that
a disk has damaged since costs that record alone: the next whole one is looked for.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from ssx_mpi.records.files import storing
from ssx_mpi.records.joined_tables import Column, TableLayout

_FRAME = struct.Struct("<4sQQII")
_MAGIC = b"SSXR"
_CHUNK = 1 << 20
# of any first line: a damaged file may have no end of line at all
_LONGEST_LINE = 1 << 16
# of a record, and of a journal; those of the first have no version in their first line
_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """A record in a journal: `image` number, `content` as given, `tables` by name, their bytes from `start` on."""

    image: int
    content: dict[str, Any]
    tables: dict[str, TableLayout]
    start: int


def encode(image: int, content: dict[str, Any], tables: dict[str, tuple[TableLayout, list[bytes]]]) -> bytes:
    """The record of one image: MessagePack-able `content`, and reflection tables taken apart."""
    layouts, blob = {}, bytearray()
    for name, (layout, data) in tables.items():
        layouts[name] = {**layout.as_dict(), "at": len(blob)}
        for items in data:
            blob += items
    header = msgpack.packb({"image": image, "content": content, "tables": layouts})
    return _FRAME.pack(_MAGIC, len(header), len(blob), zlib.crc32(header), zlib.crc32(blob)) + header + bytes(blob)


def decode(record: bytes) -> Entry:
    """The entry that :func:`encode` made `record` from, its tables lying in `record` itself."""
    _, n_header, _, _, _ = _FRAME.unpack_from(record)
    return _entry(record[_FRAME.size : _FRAME.size + n_header], _FRAME.size + n_header)


def _entry(header: bytes, start: int) -> Entry:
    content = msgpack.unpackb(header, strict_map_key=False)
    tables = {}
    for name, layout in content["tables"].items():
        at = layout["at"]
        layout["columns"] = {c: [t, n, offset + at] for c, (t, n, offset) in layout["columns"].items()}
        tables[name] = TableLayout.from_dict(layout)
    return Entry(content["image"], content["content"], tables, start)


class DamagedJournalError(ValueError):
    """The first line of a journal cannot be read, so that nobody can tell what its records belong to."""


def identity_of(path: Path) -> dict[str, Any] | None:
    """The identity that the journal at `path` was begun with; None where there is none, or only a part of that line.

    Raises
    ------
    DamagedJournalError
        When the first line is none of ours.
    """
    try:
        with path.open("rb") as file:
            return _identity_in(path, file.readline(_LONGEST_LINE))
    except FileNotFoundError:
        return None


def _identity_in(path: Path, line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n") and len(line) < _LONGEST_LINE and line.isascii():
        # killed while it was being written
        return None
    try:
        content = json.loads(line)
        version = content.pop("version", _VERSION)
    except (ValueError, TypeError, AttributeError):
        raise DamagedJournalError(f"{path} is damaged at its beginning") from None
    if version != _VERSION:
        raise DamagedJournalError(f"{path} has a form (version {version}) that this ssx_mpi does not know")
    return content


class Journal:
    """An append-only file of records, open for writing and for reading back.

    Parameters
    ----------
    path
        Created with its folder when missing; otherwise read, and cut after its last whole record.
    identity
        What the records depend on, as a JSON-able dict; a journal of another identity is not touched.

    Attributes
    ----------
    n_damaged
        Places at which records were damaged that have whole ones after them.

    Raises
    ------
    DamagedJournalError
        When the file is no journal.
    ValueError
        When it belongs to another run.
    StorageError
        When it cannot be written.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.entries: dict[int, Entry] = {}
        self.n_damaged = 0
        first_line = json.dumps(identity, sort_keys=True).encode() + b"\n"
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            try:
                self._end = self._first_line_end(first_line)
            except ValueError:
                self._file.close()
                raise
            for entry, end in self._whole_records():
                self.entries[entry.image] = entry
                self._end = end
            self._file.truncate(self._end)
            self._file.seek(self._end)

    def _first_line_end(self, first_line: bytes) -> int:
        head = self._file.read(_LONGEST_LINE).partition(b"\n")
        found = _identity_in(self.path, head[0] + head[1])
        if found is None:
            # new, or killed while its first line was being written
            self._file.seek(0)
            self._file.truncate()
            self._write(first_line)
            return len(first_line)
        if found != json.loads(first_line):
            raise ValueError(f"{self.path} belongs to a run with other parameters or images")
        return len(head[0]) + 1

    def _whole_records(self) -> Iterator[tuple[Entry, int]]:
        size = os.fstat(self._file.fileno()).st_size
        at, damaged = self._end, False
        while at + _FRAME.size <= size:
            found = self._whole_record(at, size)
            if found is not None:
                self.n_damaged += damaged
                damaged = False
                at = found[1]
                yield found
                continue
            damaged = True
            at = self._next_magic(at + 1, size)

    def _whole_record(self, at: int, size: int) -> tuple[Entry, int] | None:
        """The record that begins at `at` and where it ends; None where there is no whole one."""
        magic, n_header, n_blob, header_crc, blob_crc = _FRAME.unpack(self._read(at, _FRAME.size))
        start = at + _FRAME.size + n_header
        if magic != _MAGIC or start + n_blob > size:
            return None
        header = self._read(at + _FRAME.size, n_header)
        if zlib.crc32(header) != header_crc or zlib.crc32(self._read(start, n_blob)) != blob_crc:
            return None
        return _entry(header, start), start + n_blob

    def _next_magic(self, at: int, size: int) -> int:
        """Where a record may begin next, from `at` on; `size` where none does."""
        while at < size:
            found = self._read(at, _CHUNK).find(_MAGIC)
            if found >= 0:
                return at + found
            # the end of a chunk may hold the beginning of the four bytes
            at += _CHUNK - len(_MAGIC) + 1
        return size

    def _read(self, at: int, n_bytes: int) -> bytes:
        return os.pread(self._file.fileno(), n_bytes, at)

    def append(self, record: bytes) -> Entry:
        """Add a record made by :func:`encode`; an image that is there already keeps its first record.

        Raises
        ------
        StorageError
            When the disk does not take it; the records before it stay whole.
        """
        entry = decode(record)
        if entry.image in self.entries:
            return self.entries[entry.image]
        with storing(self.path):
            self._write(record)
        moved = Entry(entry.image, entry.content, entry.tables, self._end + entry.start)
        self._end += len(record)
        self.entries[entry.image] = moved
        return moved

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]

    @property
    def table_versions(self) -> set[int]:
        """Versions of the form of DIALS's reflection tables that the records have."""
        return {layout.version for entry in self.entries.values() for layout in entry.tables.values()}

    def column(self, entry: Entry, column: Column) -> bytes:
        """The bytes of one column of a table of `entry`."""
        return self._read(entry.start + column.offset, column.n_bytes)

    def sync(self) -> None:
        """Make sure that what was appended survives the loss of the machine."""
        with storing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
