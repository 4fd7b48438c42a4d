"""One output folder holds one run: it goes on with that one, refuses another, and clears only what is its own."""

from __future__ import annotations

import json

import pytest

from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.records.run_folder import Claimed, Programs, clear, fingerprint
from ssx_mpi.records.run_folder import claim as claim_by

RUN = {"d_min": "None", "images": "24 images (digest 0123)"}
HERE = Programs("ssx_mpi 0.2.0", (3, 12, 1))


def claim(folder, identity, restart=False, programs=HERE, defaults=()) -> Claimed:
    return claim_by(folder, identity, restart, programs, lambda: dict(defaults))


def tree(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_folder_is_made_and_then_gone_on_with(tmp_path):
    folder = tmp_path / "deep" / "out"
    assert claim(folder, RUN) == Claimed(False, fingerprint(RUN))
    assert claim(folder, RUN) == Claimed(True, fingerprint(RUN))


def test_other_parameters_are_refused_and_named(tmp_path):
    claim(tmp_path, RUN, restart=False)
    before = tree(tmp_path)
    with pytest.raises(InputError) as refused:
        claim(tmp_path, {**RUN, "d_min": "2.0"}, restart=False)
    assert "d_min was None, is 2.0" in str(refused.value)
    assert "images" not in str(refused.value).split(":", 1)[1]
    assert tree(tmp_path) == before


class TestOtherVersions:
    """A run goes on with another version where that can be, and it is said."""

    def first_form(self, folder, content, dials="3.12.1"):
        """As version 0.1.0 left it."""
        (folder / "import").mkdir()
        (folder / "import" / "run.json").write_text(json.dumps(content))
        (folder / "ssx_mpi.json").write_text(json.dumps({"program": "ssx_mpi 0.1.0", "dials": dials}))

    def test_what_was_added_since_is_taken_as_its_default(self, tmp_path):
        old = {**RUN, "spotfinding": "min_spot_size=3, phil=None", "sources": "kind=image, name=/x.nxs"}
        new = {**RUN, "spotfinding": "min_spot_size=3, max_spot_size=20, phil=None", "gain": "None"}
        new["sources"] = old["sources"]
        self.first_form(tmp_path, old)
        with pytest.raises(InputError) as refused:
            claim(tmp_path, {**new, "gain": "auto"}, defaults=new)
        assert "parameters: gain was None, is auto. Use" in str(refused.value)
        other = {**new, "spotfinding": "min_spot_size=3, max_spot_size=30, phil=None"}
        with pytest.raises(InputError, match=r"parameters: spotfinding.max_spot_size was 20, is 30\. Use"):
            claim(tmp_path, other, defaults=new)
        # results of the older version are those of this run
        for _ in range(2):
            claimed = claim(tmp_path, new, defaults=new)
            assert (claimed.continued, claimed.identity) == (True, fingerprint(old))
            assert claimed.notes == ("This run was begun with ssx_mpi 0.1.0 and goes on with ssx_mpi 0.2.0",)
        with pytest.raises(InputError, match=r"d_min was None, is 2\.0"):
            claim(tmp_path, {**new, "d_min": "2.0"}, defaults=new)

    def test_what_this_version_does_not_have_is_refused(self, tmp_path):
        claim(tmp_path, {**RUN, "newer": "x"})
        with pytest.raises(InputError, match="newer was x, which this version of ssx_mpi does not have"):
            claim(tmp_path, RUN)

    def test_another_form_of_the_file_is_refused(self, tmp_path):
        claim(tmp_path, RUN)
        path = tmp_path / "import" / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))
        with pytest.raises(InputError, match=r"run\.json was written by a newer version"):
            claim(tmp_path, RUN)

    @pytest.mark.parametrize("first_form", [True, False])
    def test_a_newer_dials_goes_on(self, tmp_path, first_form):
        newer = Programs(HERE.program, (3, 30, 1))
        if first_form:
            self.first_form(tmp_path, RUN)
        else:
            claim(tmp_path, RUN)
        (said,) = (note for note in claim(tmp_path, RUN, programs=newer).notes if "DIALS" in note)
        assert said.startswith("This run was begun with DIALS 3.12.1 and goes on with DIALS 3.30.1")
        (again,) = (note for note in claim(tmp_path, RUN, programs=newer).notes if "DIALS" in note)
        assert again == "Batches of this run were made with DIALS 3.12.1 and 3.30.1"

    def test_an_older_dials_that_cannot_read_its_files_is_refused(self, tmp_path):
        claim(tmp_path, RUN, programs=Programs(HERE.program, (3, 30, 1)))
        with pytest.raises(InputError, match=r"of DIALS 3\.30\.1, whose reflection files DIALS 3\.12\.1 cannot read"):
            claim(tmp_path, RUN)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 2}', b'{"version": "x"}', b"\xff\x00"])
def test_a_damaged_file_is_made_again_where_batches_are_of_this_run(tmp_path, content):
    claim(tmp_path, RUN)
    path = tmp_path / "import" / "run.json"
    whole = json.loads(path.read_text())
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.json is damaged.*restart=True"):
        claim(tmp_path, RUN)
    (tmp_path / "batch_1").mkdir()
    (tmp_path / "batch_1" / "journal").write_text(json.dumps({"identity": fingerprint(RUN)}) + "\nrecords")
    with pytest.raises(InputError, match="damaged"):
        claim(tmp_path, {**RUN, "d_min": "2.0"})
    assert "was damaged" in claim(tmp_path, RUN).notes[0]
    assert {**json.loads(path.read_text()), "program": HERE.program} == whole


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["batch_1", "DataFiles", "LogFiles", "import"])
def test_results_of_another_program_are_refused_and_kept(tmp_path, name, restart):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("results")
    with pytest.raises(InputError, match=f"{name} of another program"):
        claim(tmp_path, RUN, restart)
    assert tree(tmp_path) == {f"{name}/mine": b"results"}


def test_a_run_that_was_killed_before_it_said_who_it_is_is_no_other_program(tmp_path):
    (tmp_path / "import").mkdir()
    (tmp_path / "import" / ".partial.run.json").write_text("{")
    (tmp_path / "batch_1").mkdir()
    assert claim(tmp_path, RUN, restart=False).continued is False


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        claim(tmp_path / "file" / "out", RUN, restart=False)


def test_restart_clears_the_run_and_nothing_else(tmp_path):
    claim(tmp_path, RUN, restart=False)
    (tmp_path / "batch_1").mkdir()
    (tmp_path / "batch_1" / "integrated_1.refl").write_text("old")
    (tmp_path / "ssx_mpi.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "batch_raw").mkdir()
    (tmp_path / "batch_raw" / "x.cbf").write_text("image")
    assert claim(tmp_path, {**RUN, "d_min": "2.0"}, restart=True).continued is False
    assert sorted(tree(tmp_path)) == ["batch_raw/x.cbf", "import/run.json", "notes.txt"]


def test_clearing_does_not_follow_links(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "x.cbf").write_text("image")
    run = tmp_path / "run"
    run.mkdir()
    (run / "batch_1").symlink_to(images)
    clear(run)
    assert (images / "x.cbf").exists()


def test_fingerprints_tell_runs_apart():
    assert fingerprint(RUN) == fingerprint(dict(reversed(RUN.items())))
    assert fingerprint(RUN) != fingerprint({**RUN, "d_min": "2.0"})
