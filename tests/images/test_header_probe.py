"""Headers that end or hang whatever reads them."""

import gzip
import os
import sys

import pytest
from support import run

from ssx_mpi.images import header_probe
from ssx_mpi.images.header_probe import probe

CHILD = """
import json, os, signal, sys, time
for path in json.loads(sys.argv[1]):
    print("begun " + json.dumps(path), flush=True)
    if "crash" in path:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in path:
        time.sleep(1000)
    print("done", flush=True)
"""


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A child that crashes or hangs by the names of the files."""
    (tmp_path / "child.py").write_text(CHILD)
    popen = header_probe.subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, str(tmp_path / "child.py"), command[-1]], **options)

    monkeypatch.setattr(header_probe.subprocess, "Popen", start)


@pytest.mark.parametrize(
    ("names", "bad"),
    [
        (["a", "b"], []),
        (["a_crash"], ["a_crash"]),
        (["a", "b_crash", "c", "d_crash", "e"], ["b_crash", "d_crash"]),
        (["a", "b_hang", "c_crash", "d"], ["b_hang", "c_crash"]),
    ],
)
def test_the_culprits_are_named_and_the_others_looked_at(pretended, names, bad):
    found = probe(names, patience=3.0)
    assert list(found) == bad
    for name, reason in found.items():
        assert ("within 3 s" in reason) == ("hang" in name)


def test_a_good_header_is_good(thaumatin_like):
    assert probe([str(thaumatin_like)]) == {}


@pytest.fixture(scope="module")
def thaumatin_like(tmp_path_factory):
    from small_chips import small_chip

    folder = tmp_path_factory.mktemp("probe")
    small_chip(folder / "x_#.cbf", n_images=2, seed=1, hit_rate=1.0)
    return folder / "x_1.cbf"


def test_a_file_that_is_no_image_is_left_to_import(tmp_path):
    (tmp_path / "x.cbf").write_text("nothing")
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    assert probe([str(tmp_path / "x.cbf"), str(tmp_path / "x.h5"), str(tmp_path / "none.nxs")]) == {}


def test_a_master_that_ends_the_process_is_named(real_data, tmp_path):
    packed = real_data.parent / "cases" / "damaged_masters" / "damaged_141.nxs.gz"
    master = tmp_path / "damaged.nxs"
    master.write_bytes(gzip.decompress(packed.read_bytes()))
    arguments = [f"image={master}", "space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90", "nproc=1"]
    done = run(
        [sys.executable, "-m", "ssx_mpi", *arguments, f"output.directory={tmp_path / 'run'}"],
        timeout=120,
        SSX_MPI_PROBE_HEADERS="yes",
    )
    assert done.status == 2
    # newer versions of HDF5 survive it
    said = ("its header ends whatever reads it", "its header cannot be read")
    assert done.err.splitlines()[-1].startswith(tuple(f"ssx_mpi: image={master}: {words}" for words in said))
    assert "Traceback" not in done.err


def test_a_file_found_to_be_unreadable_is_left_out(thaumatin_like, monkeypatch):
    import json

    from ssx_mpi.images.experiment_maker import ExperimentMaker
    from ssx_mpi.images.frames import BadImage
    from ssx_mpi.images.sources import UNREADABLE, find_images, unreadable
    from ssx_mpi.parameters.run_parameters import Source

    monkeypatch.setenv(UNREADABLE, json.dumps({str(thaumatin_like): "it hangs"}))
    unreadable.cache_clear()
    try:
        maker = ExperimentMaker(find_images((Source("template", str(thaumatin_like.with_name("x_#.cbf"))),)))
        with pytest.raises(BadImage, match="it hangs"):
            maker.check_data(0)
        assert maker.first_readable() == 1
    finally:
        os.environ.pop(UNREADABLE)
        unreadable.cache_clear()
