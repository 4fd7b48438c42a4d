"""Run folders that earlier versions wrote are read by this one; one is added with each release, none is changed.

``run_0.1.0.tar.xz`` is that of four simulated stills (pilatus200k, seed 3, in batches of two)::

    ssx_mpi.simulate n_images=4 hit_rate=1 lattices=1 seed=3 d_min=3.6 detector.preset=pilatus200k \\
        detector.distance=110 crystal.brightness=2000 output.file=sim/x.nxs
    ssx_mpi image=sim/x.nxs space_group=P43212 unit_cell=79.1,79.1,38.2,90,90,90 output.directory=run batch_size=2 \\
        keep_intermediate=False report.html=False

without its largest files, which follow from the others.
"""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path

import pytest

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.user_input import InputError

OLD = sorted((Path(__file__).parent / "old_runs").glob("run_*.tar.xz"))


@pytest.fixture(params=OLD, ids=lambda path: path.name)
def old_run(request, tmp_path):
    """The folder of an old run."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def handlers_removed():
    """The program installs handlers for its log."""
    before = logging.getLogger("ssx_mpi").handlers[:]
    yield
    for handler in logging.getLogger("ssx_mpi").handlers[:]:
        if handler not in before:
            logging.getLogger("ssx_mpi").removeHandler(handler)
            handler.close()


def test_its_crystals_are_reduced_to_the_same_number_of_reflections(old_run, tmp_path):
    from iotbx import mtz

    from ssx_mpi.command_line import reduce

    numbers = json.loads((old_run / "ssx_mpi.json").read_text())
    folder = tmp_path / "again"
    assert reduce.main(SerialCommunicator(), [f"directory={old_run}", f"output.folder={folder}"]) == 0
    assert (
        f"{numbers['reduction']['crystals']['merged']} crystals merged" in (folder / "ssx_mpi.reduce.log").read_text()
    )
    before, after = (mtz.object(str(path / "DataFiles" / "merged.mtz")) for path in (old_run, folder))
    assert after.space_group_number() == before.space_group_number()
    # where it is cut is an estimate that may be made better; what was measured is there
    assert after.n_reflections() > 0.8 * before.n_reflections()


def test_the_same_command_line_goes_on_with_it(old_run):
    """Whatever parameters were added since: its batches are those of the run that goes on, and others are refused."""
    from ssx_mpi.command_line.process import read_arguments
    from ssx_mpi.parameters.run_parameters import default_identity
    from ssx_mpi.processing.resume import BatchKeeping, survey
    from ssx_mpi.records.batch_files import batches
    from ssx_mpi.records.run_folder import Programs, claim

    kept = json.loads((old_run / "import" / "run.json").read_text())
    source = kept["sources"].partition("name=")[2].partition(",")[0]
    crystal = ("space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90")
    others = ("batch_size=2", "keep_intermediate=False", f"output.directory={old_run}")

    def identity(*more):
        parameters, _ = read_arguments([f"image={source}", *crystal, *others, *more])
        return {**parameters.identity(), "images": kept["images"]}

    programs = Programs("ssx_mpi now", (3, 12, 1))
    with pytest.raises(InputError, match=r"parameters: integration\.rlp_mosaicity was simple6, is simple1\. Use"):
        claim(old_run, identity("integration.ellipsoid.rlp_mosaicity=simple1"), False, programs, default_identity)
    claimed = claim(old_run, identity(), False, programs, default_identity)
    assert claimed.continued
    keeping = BatchKeeping(batches(old_run, 4, 2), 2, claimed.identity, {}, False, 1)
    found = survey(SerialCommunicator(), keeping, ("find_spots", "index", "integrate"))
    assert [news.number for news in found.finished] == [1, 2]
    assert (found.pending, found.notes) == ([], [])


def test_its_page_is_written(old_run):
    from ssx_mpi.report.page import write_report

    assert write_report(old_run).stat().st_size > 1000
