"""The job scripts, as they are shipped, under a real Slurm of two nodes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from stills import SLOWLY, journalled, reflections

SCRIPTS = Path(__file__).parents[2] / "jobscripts"

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

#: seconds that a small job may take on a busy machine
LONG = 400


def output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


def submit(cluster, programs, folder, script, *arguments, options=(), **environment) -> str:
    """A shipped script with two ranks a node, so that this machine is not overrun."""
    environment = {"RANKS_PER_NODE": "1", **programs, **environment}
    return cluster.submit(*options, str(SCRIPTS / script), *arguments, cwd=folder, **environment)


def test_reduction_waits_for_the_run_that_it_depends_on(cluster, programs, stills, undisturbed, tmp_path):
    run = submit(cluster, programs, tmp_path, "one_node.sh", *stills.arguments(tmp_path / "run"), RANKS_PER_NODE="2")
    after = ("--dependency=afterok:" + run, "--kill-on-invalid-dep=yes")
    reduction = submit(
        cluster, programs, tmp_path, "reduce.sh", f"directory={tmp_path}/run", "output.folder=merged", options=after
    )
    assert cluster.state(reduction)["JobState"] == "PENDING"
    assert cluster.finished(run, LONG)["JobState"] == "COMPLETED", output(tmp_path)
    assert reflections(tmp_path / "run") == undisturbed
    assert "on 2 ranks" in output(tmp_path)
    assert cluster.finished(reduction, LONG)["JobState"] == "COMPLETED", output(tmp_path)
    assert (tmp_path / "merged" / "DataFiles" / "merged.mtz").stat().st_size > 1000

    bad = submit(cluster, programs, tmp_path, "one_node.sh", "image=none.h5")
    after = ("--dependency=afterok:" + bad, "--kill-on-invalid-dep=yes")
    reduction = submit(cluster, programs, tmp_path, "reduce.sh", f"directory={tmp_path}/run", options=after)
    assert cluster.finished(bad, LONG)["ExitCode"] == "2:0", output(tmp_path)
    assert cluster.finished(reduction, 120)["JobState"] == "CANCELLED"


def test_a_cancelled_job_and_a_dead_node_lose_nothing(cluster, programs, stills, undisturbed, tmp_path):
    directory = tmp_path / "run"
    arguments = stills.arguments(directory)
    first = submit(cluster, programs, tmp_path, "many_nodes.sh", *arguments, **SLOWLY)
    cluster.wait(lambda: journalled(directory) > 1000, LONG)
    cluster.call("scancel", first)
    assert cluster.finished(first, 60)["JobState"] == "CANCELLED"
    kept = journalled(directory)
    second = submit(cluster, programs, tmp_path, "many_nodes.sh", *arguments, **SLOWLY)
    cluster.wait(lambda: journalled(directory) != kept, LONG)
    cluster.kill_node("node2")
    assert cluster.finished(second, 120)["JobState"] == "NODE_FAIL"
    cluster.revive_node("node2")
    last = submit(cluster, programs, tmp_path, "many_nodes.sh", *arguments, LAUNCHER="mpirun")
    assert cluster.finished(last, LONG)["JobState"] == "COMPLETED", output(tmp_path)
    assert reflections(directory) == undisturbed


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_chain_goes_on_by_itself_until_all_is_done(cluster, programs, stills, undisturbed, tmp_path, launcher):
    directory = tmp_path / "run"
    arguments = stills.arguments(directory, "restart=True")
    quick = tmp_path / "quick"
    slowly = {**SLOWLY, "SLOWLY_SECONDS": "1", "SLOWLY_UNTIL": str(quick)}
    environment = {"LAUNCHER": launcher, "RANKS_PER_NODE": "2", **slowly}
    job = submit(cluster, programs, tmp_path, "chain.sh", *arguments, **environment)
    cluster.wait(lambda: journalled(directory) > 1000, LONG)
    # what Slurm does by itself 120 s before the end of the time
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(lambda: cluster.state(job).get("Restarts") == "1", LONG)
    # COMPLETING comes first
    cluster.wait(lambda: cluster.state(job)["JobState"] == "PENDING", 60)
    assert "Stopped on request" in output(tmp_path)
    assert "going on in the next job" in output(tmp_path)
    quick.touch()
    # Slurm would wait for two minutes; in the second of the requeueing itself it refuses to start the job
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    assert cluster.finished(job, LONG)["JobState"] == "COMPLETED", output(tmp_path)
    assert reflections(directory) == undisturbed


def test_a_request_to_srun_goes_to_the_ranks(cluster, programs, stills, tmp_path):
    # srun itself would kill them
    directory, go = tmp_path / "run", tmp_path / "go"
    job = cluster.submit(
        *("--nodes=2", "--output=%x_%j.log", "--wrap"),
        f"ssx_mpi.launch srun --ntasks=2 --wait=20 ssx_mpi {shlex.join(stills.arguments(directory))} & "
        f'while [ ! -e {go} ]; do sleep 0.2; done; kill -TERM $!; wait $!; echo "code $?"',
        cwd=tmp_path,
        **{**programs, **SLOWLY, "SLOWLY_SECONDS": "1"},
    )
    cluster.wait(lambda: journalled(directory) > 1000, LONG)
    go.touch()
    cluster.finished(job, 120)
    assert "Stopped on request (SIGUSR2)" in output(tmp_path)
    assert output(tmp_path).splitlines()[-1] == "code 75"


def test_a_job_that_is_killed_at_its_limit_goes_on_when_it_is_requeued(
    cluster, programs, stills, undisturbed, tmp_path
):
    directory, freed = tmp_path / "run", tmp_path / "freed"
    # the program is told of no limit, the script of no end, and no image ends within the seconds that Slurm gives it
    arguments = stills.arguments(directory, "time_limit=100000")
    stuck = {**SLOWLY, "SLOWLY_FROM": "12", "SLOWLY_SECONDS": "1000", "SLOWLY_UNTIL": str(freed)}
    told_nothing = ("--nodes=2", "--signal=B:CONT@1")
    job = submit(cluster, programs, tmp_path, "chain.sh", *arguments, options=told_nothing, **stuck)
    cluster.wait((directory / "batch_1" / "batch.json").exists, LONG)
    # a limit that was given at the start cannot be shorter than a minute
    cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+5")
    assert cluster.finished(job, 120)["JobState"] == "TIMEOUT", output(tmp_path)
    cluster.wait(lambda: not cluster.ranks(job), 60)
    assert "Stopped" not in output(tmp_path)
    # nobody came to tidy up, and what was finished is there
    assert list((directory / "in_hand").iterdir())
    freed.touch()
    cluster.call("scontrol", "requeue", job)
    cluster.wait(lambda: cluster.state(job)["JobState"] == "PENDING", 60)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30", "StartTime=now+3")
    assert cluster.finished(job, LONG)["JobState"] == "COMPLETED", output(tmp_path)
    assert re.search("[1-9][0-9]* of 24 images are finished already", output(tmp_path))
    assert reflections(directory) == undisturbed
    assert json.loads((directory / "ssx_mpi.json").read_text())["left_out"] == []


def test_a_chain_that_is_cancelled_stays_so(cluster, programs, stills, tmp_path):
    directory = tmp_path / "run"
    job = submit(cluster, programs, tmp_path, "chain.sh", *stills.arguments(directory), **SLOWLY)
    cluster.wait(lambda: journalled(directory) > 1000, LONG)
    cluster.call("scancel", job)
    assert cluster.finished(job, 60)["JobState"] == "CANCELLED"
    # the script has ended by itself, or Slurm ended it
    cluster.wait(lambda: not cluster.ranks(job), 60)
    assert cluster.state(job)["JobState"] == "CANCELLED"
    assert cluster.state(job)["Restarts"] == "0"
    assert "going on in the next job" not in output(tmp_path)


def test_an_array_processes_each_line(cluster, programs, stills, undisturbed, tmp_path):
    runs = tmp_path / "runs.txt"
    runs.write_text("output.directory=chip_1\noutput.directory=chip_2\n")
    common = [a for a in stills.arguments(tmp_path) if not a.startswith("output.directory")]
    job = submit(cluster, programs, tmp_path, "array.sh", "runs.txt", *common, options=("--array=1-2",))
    for task in ("1", "2"):
        assert cluster.finished(f"{job}_{task}", LONG)["JobState"] == "COMPLETED", output(tmp_path)
        assert reflections(tmp_path / f"chip_{task}") == undisturbed


def test_submit_hands_over_a_staged_run(cluster, programs, stills, undisturbed, tmp_path):
    directory = tmp_path / "run"
    job_parameters = ["nodes=2", "ranks_per_node=1", "time=00:20:00", "stage=local", "name=staged"]
    command = [sys.executable, "-m", "ssx_mpi.command_line.submit", *job_parameters, *stills.arguments(directory)]
    environment = {**cluster.environment, "PATH": f"{programs['PATH']}:{cluster.environment['PATH']}"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[4]
    assert cluster.finished(job, LONG)["JobState"] == "COMPLETED", output(tmp_path)
    assert "on each node" in output(tmp_path)
    assert reflections(directory) == undisturbed
    assert not list(tmp_path.glob(".ssx_mpi_environment*"))
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"ssx_mpi.{job}"))
