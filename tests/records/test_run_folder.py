"""One output folder holds one run: it goes on with that one, refuses another, and clears only what is its own."""

from __future__ import annotations

import pytest

from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.records.run_folder import claim, clear, fingerprint

RUN = {"d_min": "None", "images": "24 images (digest 0123)"}


def tree(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_folder_is_made_and_then_gone_on_with(tmp_path):
    folder = tmp_path / "deep" / "out"
    assert claim(folder, RUN, restart=False) is False
    assert claim(folder, RUN, restart=False) is True


def test_other_parameters_are_refused_and_named(tmp_path):
    claim(tmp_path, RUN, restart=False)
    before = tree(tmp_path)
    with pytest.raises(InputError) as refused:
        claim(tmp_path, {**RUN, "d_min": "2.0"}, restart=False)
    assert "d_min was None, is 2.0" in str(refused.value)
    assert "images" not in str(refused.value).split(":", 1)[1]
    assert tree(tmp_path) == before


def test_a_parameter_of_another_version_is_a_difference(tmp_path):
    claim(tmp_path, {**RUN, "older": "x"}, restart=False)
    with pytest.raises(InputError, match="older was x, is None"):
        claim(tmp_path, RUN, restart=False)


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
    assert claim(tmp_path, RUN, restart=False) is False


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
    assert claim(tmp_path, {**RUN, "d_min": "2.0"}, restart=True) is False
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
