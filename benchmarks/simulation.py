"""How quickly images are simulated and written: CPU time per image, for a detector and three hit rates.

    python benchmarks/simulation.py [eiger1m|eiger4m|pilatus6m] [n_images]

Everything runs in this one process, so images per CPU second is images/s/core.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ssx_mpi import dials_compat

dials_compat.prepare()

from ssx_mpi.kernels import still_simulation as kernel  # noqa: E402
from ssx_mpi.simulation import cbf_writer, nexus_writer  # noqa: E402
from ssx_mpi.simulation.simulation_parameters import DetectorParameters, SimulationParameters  # noqa: E402
from ssx_mpi.simulation.still_images import Simulator  # noqa: E402

COLUMNS = ("hit rate", "start-up s", "image", "Poisson", "bslz4", "lz4", "gzip", "none", "cbf", "images/s/core")


class Stopwatch:
    """CPU seconds of a block, as attribute `seconds` after it."""

    def __enter__(self) -> Stopwatch:
        self._start = time.process_time()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.process_time() - self._start


def measure(parameters: SimulationParameters, folder: Path) -> list[str]:
    """One row of the table: milliseconds per image of making images, drawing counts, and writing each format."""
    n = parameters.n_images
    with Stopwatch() as start_up:
        simulator = Simulator(parameters)
    with Stopwatch() as making:
        images = [simulator.image(i)[0] for i in range(n)]
    rng = np.random.default_rng(1)
    with Stopwatch() as drawing:
        for _ in images:
            kernel.poisson_counts(simulator.background, rng)
    shape, depth = simulator.gaps.shape, simulator.detector.preset.bit_depth
    cells = [f"{parameters.hit_rate:.0%}", f"{start_up.seconds:.2f}"]
    cells += [f"{1e3 * watch.seconds / n:.1f}" for watch in (making, drawing)]
    total = making.seconds
    for compression in ("bslz4", "lz4", "gzip", "none"):
        layout = nexus_writer.Layout(folder / f"{compression}.nxs", n, n)
        with Stopwatch() as writing:
            nexus_writer.write_data_file(layout, 0, images, shape, depth, compression)
        cells.append(f"{1e3 * writing.seconds / n:.1f}")
        total += writing.seconds if compression == "bslz4" else 0.0
    with Stopwatch() as writing:
        for i, counts in enumerate(images):
            cbf_writer.write_cbf(cbf_writer.cbf_path(folder / "x.cbf", i), counts, simulator.header)
    return [*cells, f"{1e3 * writing.seconds / n:.1f}", f"{n / total:.1f}"]


def main(preset: str, n_images: int) -> None:
    print(f"{preset}, {n_images} images in each row; milliseconds of CPU time per image, the last column with bslz4")
    print("".join(f"{name:>14s}" for name in COLUMNS))
    for hit_rate in (0.0, 0.3, 1.0):
        detector = DetectorParameters(preset, 250.0 if preset == "pilatus6m" else 70.0)
        parameters = SimulationParameters(n_images=n_images, hit_rate=hit_rate, detector=detector)
        with tempfile.TemporaryDirectory() as folder:
            print("".join(f"{cell:>14s}" for cell in measure(parameters, Path(folder))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "eiger1m", int(sys.argv[2]) if len(sys.argv) > 2 else 20)
