"""Mask files: what a mask needs is loaded, and nothing else is."""

import os
import pickle

import pytest
from dials.array_family import flex

from ssx_mpi.images.mask_files import load_mask_file


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("panels", [1, 3])
def test_a_mask_is_loaded(tmp_path, protocol, panels):
    mask = flex.bool(flex.grid(4, 5), True)
    mask[2, 3] = False
    (tmp_path / "x.mask").write_bytes(pickle.dumps((mask,) * panels if panels > 1 else mask, protocol))
    loaded = load_mask_file(tmp_path / "x.mask")
    assert len(loaded) == panels
    assert all(list(panel) == list(mask) and panel.all() == (4, 5) for panel in loaded)


class Command:
    def __reduce__(self):
        return os.system, ("touch evaluated",)


@pytest.mark.parametrize("content", [Command(), (flex.bool(flex.grid(2, 2), True), Command()), [1, 2], None])
def test_what_is_no_mask_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.mask").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"no mask needs|no array of truth values"):
        load_mask_file(tmp_path / "x.mask")
    assert not (tmp_path / "evaluated").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle at all", pickle.dumps(flex.bool(flex.grid(9, 9), True))[:-9]])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "x.mask").write_bytes(content)
    with pytest.raises(ValueError):
        load_mask_file(tmp_path / "x.mask")
