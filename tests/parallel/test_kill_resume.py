"""Whatever ends a run, the same command goes on and ends with the same bytes."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from stills import journalled, kill_all, ranks_of, reflections, terminal, wait_for

from ssx_mpi.parallel import relay


def status(directory) -> dict:
    return json.loads((directory / "ssx_mpi.json").read_text())


def test_kills_at_any_moment_change_nothing(stills, undisturbed, tmp_path):
    directory = tmp_path / "run"
    moments = random.Random(11)
    for kill in range(4):
        process = stills.start(directory, nproc=1 + kill % 3)
        before = journalled(directory)
        wait_for(lambda before=before: journalled(directory) != before, process)
        time.sleep(moments.uniform(0, 0.6))
        if kill % 2 and (ranks := ranks_of(process)):
            os.kill(moments.choice(ranks), signal.SIGKILL)
            assert process.wait(timeout=60) not in (0, 75)
        else:
            kill_all(process)
    assert stills.run(directory, nproc=2) == 0
    assert reflections(directory) == undisturbed
    total = status(directory)["total"]["counts"]
    assert total["images"] == 24
    assert not list(directory.glob("batch_*/journal"))
    assert not (directory / "in_hand").exists()


@pytest.mark.parametrize(
    ("number", "to"), [(signal.SIGTERM, "launcher"), (signal.SIGUSR1, "launcher"), (signal.SIGUSR2, "rank")]
)
def test_a_request_to_stop_ends_in_order_with_75(stills, tmp_path, undisturbed, number, to):
    directory = tmp_path / "run"
    process = stills.start(directory)
    wait_for(lambda: journalled(directory) > 1000, process)
    target = process.pid if to == "launcher" else ranks_of(process)[-1]
    os.kill(target, number)
    assert process.wait(timeout=60) == 75
    content = status(directory)
    assert content["state"] == "stopped"
    assert "the same command goes on from here" in terminal(directory)
    assert not (directory / "in_hand").exists()
    if number == signal.SIGTERM:
        assert stills.run(directory) == 0
        assert reflections(directory) == undisturbed


def test_a_request_to_the_launcher_waits_until_there_are_ranks(stills, tmp_path):
    directory = tmp_path / "run"
    process = stills.start(directory)

    def has_relay():
        # before there is one, signals are blocked for the moments in which Python starts another process
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        return b"relay" in words and relay.listens(process.pid, signal.SIGUSR1)

    wait_for(has_relay, process)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=60) == 75
    assert "Stopped on request (SIGUSR1)" in terminal(directory)


def test_the_time_limit_is_kept_ahead_of_time(stills, tmp_path, monkeypatch):
    # the time is over before the first images have begun
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1))
    directory = tmp_path / "run"
    assert stills.run(directory) == 75
    assert "Stopped ahead of the time limit" in terminal(directory)
    assert time.time() < int(os.environ["SLURM_JOB_END_TIME"]) + 60


def test_two_runs_do_not_share_a_folder(stills, tmp_path):
    directory = tmp_path / "run"
    first = stills.start(directory, nproc=1)
    try:
        wait_for(lambda: journalled(directory) > 1000, first)
        os.kill(first.pid, signal.SIGSTOP)
        assert stills.run(directory, nproc=1) == 2
        assert "another process is at work in this folder" in terminal(directory)
    finally:
        kill_all(first)


def test_a_full_disk_stops_with_the_reason_and_loses_nothing(stills, undisturbed, tmp_path):
    directory = tmp_path / "run"

    def little_room():
        # stands for a quota: no file may grow beyond this (more ranks than one have large files in shared memory)
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

    assert stills.run(directory, nproc=1, preexec_fn=little_room) == 1
    text = terminal(directory)
    assert "journal cannot be written: File too large" in text
    assert "Traceback" not in text
    assert journalled(directory) > 0
    assert stills.run(directory) == 0
    assert reflections(directory) == undisturbed


def test_other_parameters_are_refused_and_named(stills, tmp_path):
    directory = tmp_path / "run"
    process = stills.start(directory, nproc=1)
    wait_for(lambda: journalled(directory) > 1000, process)
    kill_all(process)
    kept = journalled(directory)
    assert stills.run(directory, "min_spots=17", nproc=1) == 2
    assert "min_spots was 10, is 17" in terminal(directory)
    assert journalled(directory) == kept


def test_a_request_that_comes_during_the_start_is_kept(stills, tmp_path):
    directory = tmp_path / "run"
    process = stills.start(directory, nproc=1)
    wait_for(lambda: relay.listens(process.pid, signal.SIGTERM), process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert "Stopped on request (SIGTERM)" in terminal(directory)


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_terminal_ends_it_in_order(stills, tmp_path, nproc, number):
    directory = tmp_path / "run"
    # as the terminal does, which sends it to all processes of its foreground group
    process = stills.start(directory, nproc=nproc, start_new_session=True)
    wait_for(lambda: journalled(directory) > 1000, process)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 75
    assert "Stopped on request" in terminal(directory)
    assert "Traceback" not in terminal(directory)


def test_an_interrupt_pressed_again_does_not_wait(stills, undisturbed, tmp_path):
    directory = tmp_path / "run"
    process = stills.start(directory, start_new_session=True)
    wait_for(lambda: journalled(directory) > 1000, process)
    # what is in hand will never be finished
    for rank in ranks_of(process):
        os.kill(rank, signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)
    # the second one is another only when the first was heard
    wait_for(lambda: not pending(process.pid, signal.SIGINT), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert stills.run(directory) == 0
    assert reflections(directory) == undisturbed


def pending(process: int, number: int) -> bool:
    """Whether a signal waits to be handled by a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
