"""What a rank other than 0 loads before its first image: times the ranks, that is what a file system sees."""

import json
import subprocess
import sys

import pytest

# what such a rank must not load: drawing, notebooks, programs for reduction
NEVER = ("matplotlib", "plotly", "simpy", "IPython", "dials.command_line.cosym", "dials.command_line.scale")

# measured with DIALS 3.12 of Debian: 2,184 modules and 2,477 files, most of them of DIALS itself
MOST_MODULES = 2300
MOST_FILES = 2700

PROGRAM = """
import json, sys

opened = set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
from ssx_mpi.command_line import process
from ssx_mpi.parallel import dispatch
from ssx_mpi import dials_compat
from ssx_mpi.parallel.communicator import SerialCommunicator

class NotTheFirst(SerialCommunicator):
    rank, size = 1, 2
    def bcast(self, obj, root=0):
        return obj

def stop_here(*args, **options):
    print(json.dumps({"modules": sorted(sys.modules), "files": len(opened)}))
    sys.stdout.flush()
    import os
    os._exit(0)

dials_compat.prepare()
from ssx_mpi import pipeline, watch
pipeline.on_root = lambda comm, function, expected: function()
import ssx_mpi.parallel.collective as collective
collective.on_root = pipeline.on_root
dispatch.run = stop_here
watch.Watch.open = lambda self, comm, directory: None
process._main(NotTheFirst(), sys.argv[1:])
"""


@pytest.fixture(scope="module")
def loaded(stills, tmp_path_factory) -> dict:
    arguments = stills.arguments(tmp_path_factory.mktemp("start") / "run")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_ranks_do_not_load_what_only_the_first_needs(loaded):
    assert [name for name in NEVER if name in loaded["modules"]] == []


def test_what_a_rank_loads_does_not_grow(loaded):
    assert len(loaded["modules"]) <= MOST_MODULES
    assert loaded["files"] <= MOST_FILES
