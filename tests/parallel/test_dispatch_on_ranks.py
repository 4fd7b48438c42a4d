"""The dispatch over real ranks: everything done once, kept where it belongs, and heard of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("dispatch_program.py")


def run(ranks: int, n_items: int, wanted: int = 0, stop_at: int = 0, group: int = 0) -> dict:
    command = [sys.executable, str(PROGRAM), str(n_items), str(wanted), str(stop_at), str(group)]
    launcher = ["mpiexec", "--bind-to", "none", "-n", str(ranks)] if ranks > 1 else []
    environment = {
        **os.environ,
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_mapby": ":oversubscribe",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    done = subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["size"] == ranks
    return content


# groups of two and three ranks stand for those of a thousand: coordinators that work too, and that do not
@pytest.mark.parametrize(("ranks", "group"), [(1, 0), (2, 0), (3, 0), (5, 2), (6, 3)])
def test_every_item_is_done_once_and_every_hundred_heard_of(ranks, group):
    found = run(ranks, 1050, group=group)
    assert found["items"] == list(range(1050))
    assert found["right"]
    assert found["heard"] == list(range(11))
    assert found["noted"] == 1050
    assert not found["stopped"]
    idle = {(5, 2): [2], (6, 3): [0, 3]}.get((ranks, group), [])
    assert [rank for rank, worked in enumerate(found["worked"]) if not worked] == idle


@pytest.mark.parametrize(("ranks", "group"), [(1, 0), (3, 0), (6, 3)])
def test_one_rank_that_stops_stops_all(ranks, group):
    found = run(ranks, 3000, stop_at=20, group=group)
    assert found["stopped"]
    assert 20 <= len(found["items"]) < 3000
    assert found["noted"] == len(found["items"]) == sum(found["worked"])
    assert found["right"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_first_items_that_are_worth_enough_end_it(ranks):
    found = run(ranks, 900, wanted=60)
    # items 450, 451, ... are worth 0, 1, 2, 0, ...: sixty are reached with the sixtieth
    assert found["end"] == 510
    assert set(range(450, 510)) <= set(found["items"])
    assert not found["stopped"]
