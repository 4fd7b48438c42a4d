"""The fast engine beside DIALS, stage by stage, in one command.

    python benchmarks/engine.py                      all parts, then the table
    python benchmarks/engine.py indexing memory      these parts again; of the others the last numbers are kept
    python benchmarks/engine.py table                the table alone

Numbers are kept in ``benchmarks/engine.json`` and written as tables into ``docs/performance.md``, between two markers.
Times are CPU-seconds; what is compared runs in turn in one process, so that a busy machine hurts both alike. Both
engines get the same input: images, strong spots, geometry, cell, indexed crystals.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssx_mpi import dials_compat

dials_compat.prepare()

import indexing  # noqa: E402
import integration  # noqa: E402
import numpy as np  # noqa: E402
import spotfinding  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "engine.json"
DATA = ROOT.parent / "shared" / "data"
THAUMATIN = ("space_group=P41212", "unit_cell=57.8,57.8,150.2,90,90,90")
MEMORY_IMAGES = 1000
MEMORY_STEP = 50
SIMULATED_IMAGES = 64


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(images: Path, work: Path) -> dict:
    """Resident memory of a rank over 1,000 images: the thaumatin stills over and over, under as many names.

    The whole program runs, with the refined geometry given; the memory is read when it reports a batch of 50.
    """
    stills = sorted(images.glob("*.cbf"))
    folder = work / "many"
    folder.mkdir()
    for number in range(MEMORY_IMAGES):
        (folder / f"still_{number + 1:05d}.cbf").symlink_to(stills[number % len(stills)])
    command = [
        sys.executable,
        "-c",
        "from ssx_mpi.command_line.process import run; run()",
        "nproc=1",
        f"template={folder}/still_#####.cbf:1:{MEMORY_IMAGES}",
        *THAUMATIN,
        "max_lattices=1",
        f"reference_geometry={work / 'geometry.expt'}",
        f"batch_size={MEMORY_STEP}",
        "keep_intermediate=False",
        f"output.directory={work / 'run'}",
    ]
    resident = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        try:
            for line in program.stdout:
                if line.startswith("Batch "):
                    resident.append(_status_mb(program.pid, "VmRSS"))
                    peak = _status_mb(program.pid, "VmHWM")
        finally:
            program.kill()
    summary = json.loads((work / "run" / "ssx_mpi.json").read_text())
    counts = summary["total"]["counts"]
    seconds = sum(summary["total"]["cpu_seconds"].values())
    return {
        "images": counts["images"],
        "hits": counts["hits"],
        "crystals": counts["crystals"],
        "resident_mb": resident,
        "peak_mb": peak,
        "cpu_seconds_per_image": seconds / counts["images"],
    }


def _status_mb(process: int, field: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return round(int(value) / 1024, 1)


# ---- simulated truth ------------------------------------------------------------------------------------------------


def simulated(_: Path, work: Path) -> dict:
    """Indexing and integration of simulated stills with the true geometry by both, compared with the truth.

    Both index the same strong spots; both integrate the crystals that the fast engine indexed. An image that is done is
    kept in the work folder, so that an interrupted run goes on.
    """
    from ssx_mpi.simulation import truth as true

    folder = work / "simulated"
    if not (folder / "truth.json").exists():
        _simulate(folder)
    truth = true.load_truth(folder)
    geometry = true.read_experiments(folder / "truth.expt")[1]
    images = _simulated_images(folder)
    numbers: dict[str, Any] = {"images": len(images)}
    for engine in ("fast", "dials"):
        lattices = [true.Lattice(i["image"], np.array(a)) for i in images for a in i[engine]["A"]]
        tables = sorted(folder.glob(f"{engine}_*.refl"))
        result = true.compare(truth, lattices, geometry, true.read_observations(tables))
        numbers[engine] = asdict(result) | {
            "index_s": sum(i[engine]["index_s"] for i in images) / len(images),
            "integrate_s": sum(i[engine]["integrate_s"] for i in images) / sum(len(i["fast"]["A"]) for i in images),
            "integrated": sum(i[engine]["integrated"] for i in images),
        }
    return numbers


def _simulate(folder: Path) -> None:
    from ssx_mpi.parallel.communicator import SerialCommunicator
    from ssx_mpi.simulation import parameters as p
    from ssx_mpi.simulation.data_set import simulate

    folder.mkdir(exist_ok=True)
    wanted = p.SimulationParameters(
        n_images=SIMULATED_IMAGES,
        seed=12,
        hit_rate=1.0,
        lattices=(0.75, 0.25),
        crystal=p.CrystalParameters(d_min=2.0),
        header=p.HeaderParameters((0.0, 0.0), 0.0),
        output=p.OutputParameters(folder / "lysozyme.nxs", compression="gzip"),
    )
    simulate(wanted, SerialCommunicator())


def _simulated_images(folder: Path) -> list[dict]:
    """What both engines made of each image, done now or found in the folder."""
    from dials.command_line import ssx_index, ssx_integrate
    from dxtbx.model.experiment_list import ExperimentListFactory
    from libtbx import phil

    imported = ExperimentListFactory.from_filenames([str(folder / "lysozyme.nxs")])
    index_scope = ssx_index.phil_scope.fetch(
        phil.parse(
            "indexing.known_symmetry.unit_cell=79.1,79.1,38.2,90,90,90\n"
            "indexing.known_symmetry.space_group=P43212\nindexing.multiple_lattice_search.max_lattices=2"
        )
    )
    engines = _Engines(index_scope, ssx_integrate.working_phil)
    images = []
    for number, experiment in enumerate(imported):
        path = folder / f"image_{number:04d}.json"
        if not path.exists():
            path.write_text(json.dumps(engines.both(folder, number, experiment)))
        images.append(json.loads(path.read_text()))
    return images


class _Engines:
    """Both engines with one set of parameters, on one simulated still at a time."""

    def __init__(self, index_scope: Any, integrate_scope: Any) -> None:
        from dials.command_line.find_spots import phil_scope
        from libtbx import phil

        from ssx_mpi.stages.fast_indexing import FastIndexer
        from ssx_mpi.stages.fast_spotfinding import FastSpotFinder
        from ssx_mpi.stages.frames import FrameReader

        self.index_scope, self.integrate_scope = index_scope, integrate_scope
        self.read = FrameReader(share_with_dxtbx=True)
        self.find_spots = FastSpotFinder(phil_scope.fetch(phil.parse(spotfinding.PARAMETERS)).extract())
        self.indexer = FastIndexer(index_scope.extract())

    def both(self, folder: Path, number: int, experiment: Any) -> dict:
        """Numbers of both on one image; the integrated tables are written into the folder."""
        frame = self.read(experiment.imageset)
        strong = self.find_spots(frame, experiment)
        fast = indexing.run_fast(self.indexer, experiment, strong)
        dials = indexing.run_dials(experiment, strong, self.index_scope.extract())
        own, other = {}, {}
        for name, outcome, numbers in (("fast", fast, own), ("dials", dials, other)):
            numbers |= {"A": [np.array(c.get_A()).reshape(3, 3).tolist() for c in outcome.crystals]}
            numbers |= {"index_s": outcome.seconds, "integrate_s": 0.0, "integrated": 0, "engine": name}
        if fast.crystals:
            self._integrate(folder, number, experiment, strong, frame, own, other)
        return {"image": number, "spots": len(strong), "fast": own, "dials": other}

    def _integrate(
        self, folder: Path, number: int, experiment: Any, strong: Any, frame: Any, own: dict, other: dict
    ) -> None:
        from ssx_mpi.stages.fast_integration import FastEllipsoidIntegrator

        experiments, table = self.indexer.index(experiment, strong)
        own["integrate_s"], result = spotfinding.timed(
            FastEllipsoidIntegrator(self.integrate_scope.extract()).integrate,
            experiments,
            table,
            frame.data,
            frame.masks,
        )
        own["integrated"] = len(result.experiments)
        if own["integrated"]:
            result.reflections.as_file(str(folder / f"fast_{number:04d}.refl"))
        for lattice in range(len(experiments)):
            crystal, spots = integration.one_crystal(experiments, table, lattice)
            seconds, integrated = integration.try_dials(self.integrate_scope.extract(), crystal, spots)
            other["integrate_s"] += seconds
            if integrated is not None:
                other["integrated"] += 1
                integrated.as_file(str(folder / f"dials_{number:04d}_{lattice}.refl"))
