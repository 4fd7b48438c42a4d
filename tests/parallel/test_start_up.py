"""What a rank other than 0 loads in a run: times the ranks, that is what a file system sees."""

import json
from pathlib import Path

import pytest
from support import run_mpi

from ssx_mpi import dials_compat

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "loaded.py"

# what such a rank must not load: drawing, notebooks, tables, statistics, parsers of PHIL, programs
NEVER = (
    *("matplotlib", "plotly", "simpy", "IPython", "pandas", "sklearn", "scipy.stats", "jinja2", "joblib"),
    *("dials.util.options", "dials.command_line.ssx_index", "dials.command_line.cosym", "dials.command_line.scale"),
)

# measured with DIALS 3.12 of Debian: 1,144 modules and 919 files, most of them of DIALS, scipy and h5py. Lists of entry
# points are not counted: they are one or two files for each package that is installed, 132 where this was measured
MOST_MODULES = 1150
MOST_FILES = 925
# newer versions load more, and are not counted here
_MEASURED = (3, 12)
# until the last image: what the reduction needs is loaded after that
_STEPS = "steps=find_spots+index+integrate"


@pytest.fixture(scope="module")
def loaded(stills, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("start")
    done = run_mpi(2, [PROGRAM, folder, *stills.arguments(folder / "run"), _STEPS], timeout=240)
    assert done.status == 0, done.text
    return json.loads((folder / "rank_1.json").read_text())


def test_ranks_do_not_load_what_only_the_first_needs(loaded):
    assert [name for name in NEVER if name in loaded["modules"]] == []


def test_what_a_rank_loads_does_not_grow(loaded):
    assert "dials.array_family.flex" in loaded["modules"]
    if dials_compat.dials_version()[:2] != _MEASURED:
        pytest.skip("the limits are those of DIALS 3.12")
    assert len(loaded["modules"]) <= MOST_MODULES
    assert len([name for name in loaded["files"] if not _is_metadata(name)]) <= MOST_FILES


def _is_metadata(name: str) -> bool:
    return Path(name).parent.suffix in (".egg-info", ".dist-info") or Path(name).suffix == ".egg-info"
