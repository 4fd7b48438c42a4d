"""Joining reflection tables by their bytes gives what DIALS gives by joining the tables."""

from __future__ import annotations

import io

import numpy as np
import pytest
from dials.array_family import flex
from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.records import joined_tables
from ssx_mpi.records.joined_tables import TableLayout, TablePart, take_apart, write_joined

COLUMNS = ("intensity", "miller_index", "xyz", "flags", "entering", "panel", "covariance")


def table(rng: np.random.Generator, n_rows: int, n_experiments: int = 1, columns=COLUMNS, shoeboxes: bool = False):
    """A reflection table with columns of many types; some rows belong to no experiment."""
    made = flex.reflection_table()
    made["id"] = flex.int(rng.integers(-1, n_experiments, n_rows).astype(np.int32))
    made["imageset_id"] = flex.int(np.zeros(n_rows, np.int32))
    values = {
        "intensity": lambda: flex.double(rng.normal(size=n_rows)),
        "miller_index": lambda: flex.miller_index(rng.integers(-50, 50, (n_rows, 3)).tolist()),
        "xyz": lambda: flex.vec3_double(rng.normal(size=(n_rows, 3))),
        "flags": lambda: flex.size_t(rng.integers(0, 2**31, n_rows).astype(np.uint64)),
        "entering": lambda: flex.bool((rng.random(n_rows) > 0.5).tolist()),
        "panel": lambda: flex.size_t(rng.integers(0, 9, n_rows).astype(np.uint64)),
        "covariance": lambda: flex.mat3_double(flex.double(rng.normal(size=9 * n_rows))),
    }
    for name in columns:
        made[name] = values[name]()
    for i in range(n_experiments):
        made.experiment_identifiers()[i] = f"crystal-{rng.integers(10**9)}"
    if shoeboxes:
        made["shoebox"] = flex.shoebox(made["panel"], flex.int6([(0, 2 + i % 3, 0, 3, 0, 1) for i in range(n_rows)]))
        for box in made["shoebox"]:
            # newer versions keep data and background apart
            for allocate in (
                ("allocate_data", "allocate_background") if hasattr(box, "allocate_data") else ("allocate",)
            ):
                getattr(box, allocate)()
    return made


def parts_of(many, n_imagesets=None) -> list[TablePart]:
    """What a journal would hand over for these tables."""
    parts, first = [], 0
    for k, each in enumerate(many):
        packed = each.as_msgpack()
        layout, data = take_apart(packed)
        blob = b"".join(data)
        parts.append(TablePart(layout, lambda c, b=blob: b[c.offset : c.offset + c.n_bytes], first, k))
        first += len(each.experiment_identifiers().keys())
    return parts


def joined_by_dials(many):
    whole, first = flex.reflection_table(), 0
    identifiers = {}
    for k, each in enumerate(many):
        own = each.select(flex.bool(len(each), True))
        known = dict(each.experiment_identifiers())
        for key in list(own.experiment_identifiers().keys()):
            del own.experiment_identifiers()[key]
        belongs = own["id"] >= 0
        own["id"].set_selected(belongs, own["id"].select(belongs) + first)
        own["imageset_id"] = flex.int(len(own), k)
        if len(own):
            identifiers.update({i + first: name for i, name in known.items()})
        first += len(known)
        whole.extend(own)
    for i, name in identifiers.items():
        whole.experiment_identifiers()[i] = name
    return whole


def written(many) -> bytes:
    file = io.BytesIO()
    n_rows = write_joined(file, parts_of(many))
    assert n_rows == sum(map(len, many))
    return file.getvalue()


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_joined_bytes_are_those_of_dials(sizes, seed):
    rng = np.random.default_rng(seed)
    many = [table(rng, n_rows, n_experiments) for n_rows, n_experiments in sizes]
    if not sum(map(len, many)):
        return
    assert take_apart(written(many)) == take_apart(joined_by_dials(many).as_msgpack())


def test_dials_reads_a_joined_file_and_writes_its_own_again(tmp_path):
    many = [table(np.random.default_rng(k), 5 + k, 2) for k in range(3)]
    (tmp_path / "joined.refl").write_bytes(written(many))
    read = flex.reflection_table.from_file(str(tmp_path / "joined.refl"))
    assert read.as_msgpack() == joined_by_dials(many).as_msgpack()


def test_shoeboxes_are_joined_whole():
    many = [table(np.random.default_rng(k), 4 + k, shoeboxes=True) for k in range(3)]
    read = flex.reflection_table.from_msgpack(written(many))
    boxes = [box for each in many for box in each["shoebox"]]
    assert [b.bbox for b in read["shoebox"]] == [b.bbox for b in boxes]
    assert all(np.array_equal(np.asarray(a.data), np.asarray(b.data)) for a, b in zip(read["shoebox"], boxes))


def test_a_column_that_some_lack_is_zero_there():
    rng = np.random.default_rng(1)
    full, poor = table(rng, 3), table(rng, 2, columns=("intensity", "miller_index"))
    read = flex.reflection_table.from_msgpack(written([poor, full]))
    assert list(read["xyz"])[:2] == [(0, 0, 0)] * 2
    assert list(read["xyz"])[2:] == list(full["xyz"])
    assert list(read["intensity"]) == list(poor["intensity"]) + list(full["intensity"])


def test_shoeboxes_that_some_lack_are_left_out():
    rng = np.random.default_rng(1)
    read = flex.reflection_table.from_msgpack(written([table(rng, 3, shoeboxes=True), table(rng, 2)]))
    assert len(read) == 5
    assert "shoebox" not in read


def test_rows_of_no_experiment_stay_so():
    many = [table(np.random.default_rng(k), 30) for k in range(2)]
    read = flex.reflection_table.from_msgpack(written(many))
    for k, each in enumerate(many):
        own = np.asarray(read["id"])[30 * k : 30 * (k + 1)]
        assert np.array_equal(own, np.where(np.asarray(each["id"]) < 0, -1, k))
        assert set(own) == {-1, k}


def test_tables_of_two_format_versions_are_not_mixed():
    first, second = parts_of([table(np.random.default_rng(1), 2)] * 2)
    newer = TableLayout(first.layout.version + 1, second.layout.n_rows, {}, second.layout.columns)
    with pytest.raises(ValueError, match="different versions"):
        write_joined(io.BytesIO(), [first, TablePart(newer, second.read, 1, 1)])


def test_a_column_too_long_for_the_format_says_what_to_do(monkeypatch):
    monkeypatch.setattr(joined_tables, "_COPY_LIMIT", 100)
    with pytest.raises(ValueError, match="smaller batch_size"):
        joined_tables._bin_header(101)


def test_what_is_no_table_is_refused():
    import msgpack

    with pytest.raises(ValueError, match="not a reflection table"):
        take_apart(msgpack.packb(["something else", 1, {}]))


def test_a_layout_survives_its_dict():
    layout, _ = take_apart(table(np.random.default_rng(2), 3, 2).as_msgpack())
    assert TableLayout.from_dict(layout.as_dict()) == layout
