"""DIALS reflection tables as columns of bytes: taken apart once, joined by copying, never held whole in memory.

A ``.refl`` is MessagePack: ``[name, version, {identifiers, nrows, data: {column: [type, [n, bytes]]}}]``, the bytes
of a column being its items one after another, also for shoeboxes. Tables with the same columns are therefore joined by
joining the bytes of each column; only ``id`` changes, by the number of experiments that come before. A batch of a
thousand images, gigabytes of reflections, is written in the memory of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import msgpack
import numpy as np

_NAME = "dials::af::reflection_table"
_INDEX_COLUMNS = ("id", "imageset_id")
_COPY_LIMIT = 2**32 - 1


@dataclass(frozen=True)
class Column:
    """One column of a table: DIALS's name of its type, and its bytes or where they lie in a file."""

    type: str
    n_bytes: int
    offset: int = 0


@dataclass(frozen=True)
class TableLayout:
    """A table without its data: `columns` by name, `identifiers` of the experiments by their number in the table."""

    version: int
    n_rows: int
    identifiers: dict[int, str]
    columns: dict[str, Column]

    def as_dict(self) -> dict:
        return {
            "version": self.version,
            "n_rows": self.n_rows,
            "identifiers": self.identifiers,
            "columns": {name: [c.type, c.n_bytes, c.offset] for name, c in self.columns.items()},
        }

    @classmethod
    def from_dict(cls, content: dict) -> TableLayout:
        columns = {name: Column(*values) for name, values in content["columns"].items()}
        return cls(content["version"], content["n_rows"], content["identifiers"], columns)


def take_apart(packed: bytes) -> tuple[TableLayout, list[bytes]]:
    """Layout and column data of a table in DIALS's MessagePack form, the offsets counted from the first column.

    Raises
    ------
    ValueError
        When `packed` is no reflection table.
    """
    name, version, content = msgpack.unpackb(packed, strict_map_key=False, max_bin_len=_COPY_LIMIT)
    if name != _NAME:
        raise ValueError(f"not a reflection table but {name!r}")
    columns, data, offset = {}, [], 0
    for column, (type_, (_, items)) in content["data"].items():
        columns[column] = Column(type_, len(items), offset)
        data.append(items)
        offset += len(items)
    return TableLayout(version, content["nrows"], dict(content["identifiers"]), columns), data


@dataclass(frozen=True)
class TablePart:
    """One table to be joined to others.

    Attributes
    ----------
    layout
        Its columns and where their bytes are.
    read
        Returns the bytes of a column.
    first_id, first_imageset
        Numbers that its first experiment and its first imageset get in the joined table.
    """

    layout: TableLayout
    read: Callable[[Column], bytes]
    first_id: int
    first_imageset: int


def write_joined(file: BinaryIO, parts: Sequence[TablePart]) -> int:
    """Write the tables of `parts`, one below the other, as one ``.refl``; return its number of rows.

    A column that some of the tables lack is filled with zeros there; one whose items vary in size is left out.

    Raises
    ------
    ValueError
        For tables of different format versions.
    """
    parts = [p for p in parts if p.layout.n_rows]
    versions = {p.layout.version for p in parts}
    if len(versions) > 1:
        raise ValueError(f"reflection tables of different versions cannot be joined: {sorted(versions)}")
    n_rows = sum(p.layout.n_rows for p in parts)
    identifiers = {i + p.first_id: name for p in parts for i, name in sorted(p.layout.identifiers.items())}
    columns = _common_columns(parts)
    packer = msgpack.Packer()
    file.write(packer.pack_array_header(3) + packer.pack(_NAME) + packer.pack(versions.pop() if versions else 1))
    file.write(packer.pack_map_header(3) + packer.pack("identifiers") + packer.pack(identifiers))
    file.write(packer.pack("nrows") + packer.pack(n_rows) + packer.pack("data") + packer.pack_map_header(len(columns)))
    for name, (type_, item_size) in columns.items():
        sizes = [
            p.layout.columns[name].n_bytes if name in p.layout.columns else item_size * p.layout.n_rows for p in parts
        ]
        file.write(packer.pack(name) + packer.pack_array_header(2) + packer.pack(type_) + packer.pack_array_header(2))
        file.write(packer.pack(n_rows) + _bin_header(sum(sizes)))
        for part, size in zip(parts, sizes):
            file.write(_column_bytes(part, name, size))
    return n_rows


def _common_columns(parts: Iterable[TablePart]) -> dict[str, tuple[str, int]]:
    """Type and size of an item (0: it varies) of every column that the joined table has."""
    found: dict[str, tuple[str, int]] = {}
    missing: set[str] = set()
    names: set[str] = {name for p in parts for name in p.layout.columns}
    for part in parts:
        missing |= names - set(part.layout.columns)
        for name, column in part.layout.columns.items():
            size = 0 if column.type.startswith("Shoebox") else column.n_bytes // part.layout.n_rows
            found[name] = (column.type, size)
    return {name: found[name] for name in sorted(found) if found[name][1] or name not in missing}


def _bin_header(n_bytes: int) -> bytes:
    if n_bytes > _COPY_LIMIT:
        raise ValueError("a column of more than 4 GB does not fit a reflection file: choose a smaller batch_size")
    return b"\xc6" + n_bytes.to_bytes(4, "big")


def _column_bytes(part: TablePart, name: str, size: int) -> bytes:
    column = part.layout.columns.get(name)
    if column is None:
        return bytes(size)
    items = part.read(column)
    if name not in _INDEX_COLUMNS:
        return items
    numbers = np.frombuffer(items, np.int32)
    # negative numbers mark reflections of no experiment
    first = part.first_id if name == "id" else part.first_imageset
    return np.where(numbers >= 0, numbers + np.int32(first), numbers).astype(np.int32).tobytes()
