"""CPU-seconds and agreement of the fast spot finder with DIALS, image by image, from file to reflection table.

    python benchmarks/spotfinding.py IMAGE... [--repeats 3]

Both run in this process, in turn, on every image, with DIALS's defaults but for 3 to 20 pixels a spot. The shortest of
the repeats counts. What each of them does once per run is done before (and shown in the last line for the fast one).
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass

from ssx_mpi import dials_compat

# before NumPy, which starts its threads when it is loaded
dials_compat.prepare()

import libtbx.phil  # noqa: E402
import numpy as np  # noqa: E402
from dials.array_family import flex  # noqa: E402
from dials.command_line.find_spots import phil_scope  # noqa: E402
from dxtbx.model import ExperimentList  # noqa: E402
from dxtbx.model.experiment_list import ExperimentListFactory  # noqa: E402

from ssx_mpi.images.frames import FrameReader  # noqa: E402
from ssx_mpi.stages.fast.fast_spotfinding import FastSpotFinder  # noqa: E402

PARAMETERS = "spotfinder.filter.min_spot_size=3\nspotfinder.filter.max_spot_size=20\n"
SAME_SPOT_PX = 0.01


@dataclass(frozen=True)
class Comparison:
    """One image: CPU-seconds, numbers of spots, and the largest difference of two centroids that agree."""

    name: str
    read_s: float
    find_s: float
    dials_s: float
    n_fast: int
    n_dials: int
    n_common: int
    worst_px: float


def load(path):
    """Experiment of one image; a new one each time, so that dxtbx has nothing of it in memory."""
    return ExperimentListFactory.from_filenames([path])[0]


def timed(function, *arguments):
    """CPU-seconds of a call, and its result."""
    start = time.process_time()
    result = function(*arguments)
    return time.process_time() - start, result


def matched(fast, reference):
    """Number of reference centroids (x, y in pixels) met within 0.01 pixels, and the largest of those distances."""
    a, b = (np.array(table["xyzobs.px.value"]).reshape(-1, 3)[:, :2] for table in (fast, reference))
    if len(a) == 0 or len(b) == 0:
        return 0, 0.0
    nearest = np.linalg.norm(b[:, None] - a[None], axis=2).min(axis=1)
    common = nearest[nearest <= SAME_SPOT_PX]
    return len(common), float(common.max(initial=0.0))


def compare(path, repeats, reader, finder, params):
    """Run both on one image."""
    reading, finding, dials = [], [], []
    for _ in range(repeats):
        experiment = load(path)
        seconds, reference = timed(
            flex.reflection_table.from_observations, ExperimentList([experiment]), copy.deepcopy(params), True
        )
        dials.append(seconds)
        experiment = load(path)
        seconds, frame = timed(reader, experiment.imageset)
        reading.append(seconds)
        seconds, fast = timed(finder, frame, experiment)
        finding.append(seconds)
    n_common, worst = matched(fast, reference)
    name = path.rsplit("/", 1)[-1]
    return Comparison(name, min(reading), min(finding), min(dials), len(fast), len(reference), n_common, worst)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    params = phil_scope.fetch(libtbx.phil.parse(PARAMETERS)).extract()
    reader, finder = FrameReader(), FastSpotFinder(params)
    experiment = load(arguments.images[0])
    once_s, _ = timed(lambda: finder.find(experiment, reader(experiment.imageset)))

    print(f"DIALS {'.'.join(map(str, dials_compat.dials_version()))}; CPU-seconds, shortest of {arguments.repeats}")
    columns = {
        "DIALS": 8,
        "read": 8,
        "find": 8,
        "fast": 8,
        "ratio": 7,
        "spots": 8,
        "ours": 7,
        "common": 8,
        "worst px": 10,
    }
    print(f"{'image':24}" + "".join(f"{name:>{width}}" for name, width in columns.items()))
    rows = [compare(path, arguments.repeats, reader, finder, params) for path in arguments.images]
    for r in rows:
        fast_s = r.read_s + r.find_s
        print(
            f"{r.name:24}{r.dials_s:8.3f}{r.read_s:8.3f}{r.find_s:8.3f}{fast_s:8.3f}{r.dials_s / fast_s:7.1f}"
            f"{r.n_dials:8d}{r.n_fast:7d}{r.n_common:8d}{r.worst_px:10.2g}"
        )
    dials_s, read_s, find_s = (np.mean([getattr(r, s) for r in rows]) for s in ("dials_s", "read_s", "find_s"))
    n_dials, n_fast, n_common = (sum(getattr(r, n) for r in rows) for n in ("n_dials", "n_fast", "n_common"))
    print(
        f"{'mean; sum of spots':24}{dials_s:8.3f}{read_s:8.3f}{find_s:8.3f}{read_s + find_s:8.3f}"
        f"{dials_s / (read_s + find_s):7.1f}{n_dials:8d}{n_fast:7d}{n_common:8d}{max(r.worst_px for r in rows):10.2g}"
    )
    print(f"same spots: {n_common / n_dials:.2%}; first image, with what is done once: {once_s:.3f}")


if __name__ == "__main__":
    main()
