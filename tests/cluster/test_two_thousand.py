"""Two thousand images, a twentieth of them damaged, over kills and a time limit: all of it ends complete and right."""

import collections
import json
import os
import signal

import pytest
from many import N_IMAGES, ManyStills
from stills import SLOWLY, journalled, reflections
from test_jobs import LONG, output, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> ManyStills:
    return ManyStills.made(tmp_path_factory.mktemp("many") / "images")


def test_all_images_are_processed_once_whatever_happens(cluster, programs, many, tmp_path):
    directory = tmp_path / "run"
    arguments = many.arguments(directory)
    quick = tmp_path / "quick"
    # as slow as a run must be that is ended four times, however quick the machine is
    slowly = {**SLOWLY, "SLOWLY_SECONDS": "0.15", "SLOWLY_UNTIL": str(quick)}
    told_early = ("--nodes=2", "--signal=B:USR1@60")
    job = submit(cluster, programs, tmp_path, "chain.sh", *arguments, options=told_early, RANKS_PER_NODE="2", **slowly)
    kill_a_rank(cluster, job, directory, 3, tmp_path)
    # a limit from the start, of a minute at least, would come at any moment of a kill
    cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+60")
    cluster.wait(lambda: cluster.state(job).get("Restarts") == "1", LONG)
    assert "going on in the next job" in output(tmp_path)
    cluster.wait(lambda: cluster.state(job)["JobState"] == "PENDING", 60)
    # enough for the slowest machine; and Slurm would wait for two minutes
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30", "StartTime=now+3")
    kill_a_rank(cluster, job, directory, 0, tmp_path)
    kill_a_rank(cluster, job, directory, 1, tmp_path)
    quick.touch()
    assert cluster.finished(job, LONG)["JobState"] == "COMPLETED", output(tmp_path)
    assert "on 4 ranks" in output(tmp_path)

    check_all_accounted_for(directory, many)
    expected = tmp_path / "undisturbed"
    alone = submit(cluster, programs, tmp_path, "one_node.sh", *many.arguments(expected), RANKS_PER_NODE="2")
    assert cluster.finished(alone, LONG)["JobState"] == "COMPLETED", output(tmp_path)
    assert reflections(directory) == reflections(expected)
    images = [read_images(folder) for folder in (directory, expected)]
    assert images[0] == images[1]


def kill_a_rank(cluster, job: str, directory, rank: int, logs) -> None:
    """SIGKILL to `rank` of `job` once it has brought something to an end since now; wait until the script knows."""
    before, attempts = progress(directory), output(logs).count("Attempt ")
    cluster.wait(lambda: progress(directory) > before and rank in cluster.ranks(job), LONG)
    os.kill(cluster.ranks(job)[rank], signal.SIGKILL)
    cluster.wait(lambda: output(logs).count("Attempt ") > attempts, LONG)


def progress(directory) -> int:
    """Grows with every image that is finished."""
    written = sum(path.stat().st_size for path in directory.glob("batch_*/*.json"))
    return journalled(directory) + 10_000_000 * written


def read_images(directory) -> dict[int, dict]:
    """What is recorded of each image, by its number, without the times."""
    found = {}
    for path in directory.glob("batch_*/images.json"):
        for image in json.loads(path.read_text()):
            assert image["image"] not in found
            del image["seconds"]
            found[image["image"]] = image
    return found


def check_all_accounted_for(directory, many: ManyStills) -> None:
    images = read_images(directory)
    assert sorted(images) == list(range(N_IMAGES))
    assert len({image["name"] for image in images.values()}) == N_IMAGES
    failed = {image["name"]: image["failures"] for image in images.values() if image["failures"]}
    assert set(failed) == many.damaged
    assert {stage for failures in failed.values() for stage, _ in failures} == {"read"}
    # like causes are counted together
    assert len(collections.Counter(reason for failures in failed.values() for _, reason in failures)) < 10

    content = json.loads((directory / "ssx_mpi.json").read_text())
    assert content["state"] == "done"
    assert content["total"]["counts"]["images"] == N_IMAGES
    assert content["total"]["counts"]["crystals"] == content["total"]["counts"]["hits"] == N_IMAGES // 40
    assert {name for name, _, _ in content["left_out"]} == many.damaged
    assert not list(directory.glob("batch_*/journal"))
    assert not (directory / "in_hand").exists()
