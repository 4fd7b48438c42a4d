"""Cost of statistics while batches finish (live_merge), against what the images of a batch cost.

    python benchmarks/live_merge.py [--crystals 100 300 1000] [--reflections 1000] [--d-min 1.8]

For a batch of so many crystals of synthetic lysozyme: CPU-seconds of the keeper for reading the files of the batch and
summing its crystals up, megabytes that travel to rank 0, and CPU-seconds of rank 0 for adding them and computing the
statistics.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from ssx_mpi import dials_compat

dials_compat.prepare()
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "reduction"))

import synthetic  # noqa: E402

from ssx_mpi.reduction.live_merge import LiveMerge  # noqa: E402


def measure(n_crystals: int, per_crystal: int, d_min: float) -> None:
    """Print one line of the table."""
    lattice = synthetic.Lattice(synthetic.LYSOZYME.cell, synthetic.LYSOZYME.space_group, d_min)
    observations, _ = synthetic.simulate(lattice, n_crystals, per_crystal=per_crystal)
    live = LiveMerge(lattice.cell, lattice.space_group, d_min)
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_files(Path(folder), observations, lattice, per_file=n_crystals)
        began = time.process_time()
        sums = live.of_batch(Path(folder))
        keeper = time.process_time() - began
    began = time.process_time()
    found = live.add(sums)
    root = time.process_time() - began
    print(
        f"{n_crystals:8d}{keeper:10.2f}{1e3 * keeper / n_crystals:12.2f}{sums.nbytes / 1e6:8.2f}{root:8.3f}"
        f"{100 * found.completeness[-1]:12.1f}{found.multiplicity[-1]:8.2f}{found.cc_half[-1]:8.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--reflections", type=int, default=1000)
    parser.add_argument("--d-min", type=float, default=1.8)
    options = parser.parse_args()
    print("crystals  keeper s  ms/crystal      MB  root s  complete. %   mult.   CC1/2")
    for n in options.crystals:
        measure(n, options.reflections, options.d_min)


if __name__ == "__main__":
    main()
