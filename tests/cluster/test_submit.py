"""Job scripts and what ssx_mpi.submit asks for, without a batch system."""

import json
import subprocess
from pathlib import Path

import pytest

from ssx_mpi.command_line import submit
from ssx_mpi.submission import estimate, scripts

SHIPPED = Path(__file__).parents[2] / "jobscripts"


@pytest.mark.parametrize("kind", scripts.KINDS)
@pytest.mark.parametrize("stage", [None, "local"])
def test_scripts_are_sound_bash_and_their_options_come_first(kind, stage, tmp_path):
    text = scripts.render(kind, scripts.Site(stage=stage, modules=("dials",), partition="short"), ["image=a b.h5"])
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    lines = text.splitlines()
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < commands[0]
    assert "'image=a b.h5'" in text
    assert text.count("==== ") == 2
    assert "module load dials" in lines
    assert ("from_local_disk" in text) == (stage == "local")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("01:00:00", 120), ("1", 15), ("2:00", 30), ("00:04:00", 60), ("1-0", 120), ("0-00:01", 15), ("UNLIMITED", 120)],
)
def test_a_short_job_is_not_told_to_end_at_its_beginning(time, seconds):
    assert scripts.lead_seconds(time) == seconds
    assert f"#SBATCH --signal=B:USR1@{seconds}\n" in scripts.render("chain", scripts.Site(time=time))


@pytest.mark.parametrize("kind", scripts.KINDS)
def test_the_shipped_scripts_are_the_rendered_ones(kind):
    site = scripts.Site(nodes=2 if kind == "many_nodes" else 1)
    assert (SHIPPED / f"{kind}.sh").read_text() == scripts.render(kind, site)


def test_dry_run_shows_the_job_and_its_reduction(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.cbf").touch()
    with pytest.raises(SystemExit) as end:
        submit.run(["--dry-run", "nodes=4", "time=00:30:00", "partition=short", "reduce=True", "image=x.cbf"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=4\n#SBATCH --time=00:30:00\n#SBATCH --partition=short" in text
    assert "on_all_ranks ssx_mpi image=x.cbf steps=find_spots+index+integrate\n" in text
    assert f"on_all_ranks ssx_mpi.reduce directory={tmp_path} output.folder={tmp_path}\n" in text


def test_the_runs_of_an_array_are_reduced_together(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs.txt").write_text("image=a.h5 output.directory=chip_1\n\nimage=b.h5 output.directory=chip_2\n")
    with pytest.raises(SystemExit) as end:
        submit.run(["--dry-run", "runs=runs.txt", "reduce=True", "space_group=P43212", "d_min=2"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=1-2\n" in text
    assert f"set -- {tmp_path}/runs.txt space_group=P43212 d_min=2 steps=find_spots+index+integrate\n" in text
    assert f"on_all_ranks ssx_mpi.reduce directory={tmp_path}/chip_1 directory={tmp_path}/chip_2\n" in text


def test_empty_lines_of_an_array_do_not_count(tmp_path):
    (tmp_path / "runs.txt").write_bytes(b"image=a.h5 d_min=2\r\n \r\nimage=b.h5\r\n")
    script = scripts.render("array", scripts.Site(tasks=2), [f"{tmp_path}/runs.txt", "max_lattices=1"])
    own = 'on_all_ranks() { echo "$*"; }\n' + script[script.index("\nset -- ") :]
    said = [
        subprocess.run(
            ["bash"], input=own, text=True, capture_output=True, check=False, env={"SLURM_ARRAY_TASK_ID": str(task)}
        ).stdout
        for task in (1, 2)
    ]
    assert said == ["ssx_mpi image=a.h5 d_min=2 max_lattices=1\n", "ssx_mpi image=b.h5 max_lattices=1\n"]


def test_templates_of_images_are_no_templates_of_scripts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        submit.run(["--dry-run", "template=one_node", "template=x_###.cbf", "nodes=1", "time=10"])
    assert end.value.code == 0
    assert "ssx_mpi 'template=x_###.cbf'\n" in capsys.readouterr().out


def test_runs_reduce_their_own_crystals_where_nothing_else_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.cbf").touch()
    with pytest.raises(SystemExit):
        submit.run(["--dry-run", "nodes=1", "time=00:30:00", "image=x.cbf"])
    text = capsys.readouterr().out
    assert "steps=" not in text and "ssx_mpi.reduce" not in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nodes=x", "image=x.cbf"], "nodes=x"),
        (["template=two", "image=x.cbf"], "template=two"),
        (["runs=none.txt"], "runs=none.txt"),
        (["runs=empty.txt"], "a line for each run"),
        (["cost=nan", "image=x.cbf"], "cost=nan"),
        (["cost=0", "image=x.cbf"], "cost=0"),
        (["spacegroup=P1", "image=x.cbf"], "did you mean space_group"),
        (["nodes=1"], "no images given"),
    ],
)
def test_bad_parameters_are_named_before_anything_is_submitted(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.cbf").touch()
    Path("empty.txt").touch()
    with pytest.raises(SystemExit) as end:
        submit.run(arguments)
    assert end.value.code == 2
    assert named in capsys.readouterr().err


def test_suggestions_keep_the_ranks_busy():
    few = estimate.suggest(1000, 0.5, ranks_per_node=64)
    assert (few.nodes, few.time) == (1, "00:05:00")
    many = estimate.suggest(10_000_000, 1.0, ranks_per_node=128)
    assert many.nodes * 128 * 200 <= 10_000_000
    assert 10_000_000 * 1.0 / (many.nodes * 128) <= 1210
    given = estimate.suggest(100_000, 1.0, ranks_per_node=100, nodes=1)
    assert given.seconds >= 180 + 1.5 * 1000


def test_the_cost_is_taken_from_an_earlier_run(tmp_path):
    path = tmp_path / "ssx_mpi.json"
    path.write_text(
        json.dumps({"total": {"cpu_seconds": {"find_spots": 30.0, "index": 20.0}, "counts": {"images": 100}}})
    )
    assert estimate.measured_cost(path) == 0.5
    assert estimate.measured_cost(tmp_path / "none") is None
