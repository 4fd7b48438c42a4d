"""ssx_mpi.compare: which folders it takes, and what it refuses. The comparison itself is tested with the simulation."""

from __future__ import annotations

import json

import pytest

from ssx_mpi.command_line import compare


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sim", "run"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("arguments", [["sim", "run"], ["truth=sim", "run=run"], ["run=run", "sim"]])
def test_folders_are_given_by_name_or_in_their_order(folders, arguments):
    found = compare.read_arguments(arguments)
    assert (found.truth, found.run, found.json) == (folders / "sim", folders / "run", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give two folders"),
        (["sim"], "give two folders"),
        (["sim", "lost"], "there is no such folder"),
        (["sim", "run", "sim"], "two folders are compared"),
        (["trth=sim", "run"], "did you mean truth="),
        (["sim", "run"], "no integrated or indexed experiments"),
    ],
)
def test_what_cannot_be_compared_is_one_line(folders, capsys, arguments, said):
    assert compare.main(arguments) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1


def test_the_table_is_printed_and_the_numbers_are_written(folders, capsys, monkeypatch):
    from ssx_mpi.simulation import truth

    values = dict.fromkeys(truth.Comparison.__dataclass_fields__, 1) | {"reduced": None, "panels": None}
    monkeypatch.setattr(truth, "compare_run", lambda sim, run: truth.Comparison(**values))
    assert compare.main(["sim", "run", "output.json=out.json"]) == 0
    assert "false lattices" in capsys.readouterr().out
    assert json.loads((folders / "out.json").read_text())["false_lattices"] == 1
