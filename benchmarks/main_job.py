"""The main job as a whole: how fast it is, how quickly it starts, and how near to the truth it comes.

  python benchmarks/main_job.py rates [STILLS]      images/s and peak memory of 1 and 2 ranks, side by side; STILLS is a
                                                    folder of thaumatin stills (.cbf or .cbf.bz2), for real data as well
  python benchmarks/main_job.py start               from the start to the first image in hand, with 100,000 images
  python benchmarks/main_job.py truth               a simulated lysozyme chip with a wrong header against the truth;
                                                    integrated by DIALS as well it is in benchmarks/engine.py

Everything is made in a temporary folder (TMPDIR). The tables are printed as they stand in docs/performance.md.
"""

from __future__ import annotations

import argparse
import bz2
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LYSOZYME = ("space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90")
THAUMATIN = ("space_group=P41212", "unit_cell=58.4,58.4,152.3,90,90,90", "max_lattices=1")
# as in the demo: the beam centre is 0.36 mm wrong, and the distance 0.4 mm
WRONG_HEADER = ("header.beam_offset=0.2,-0.3", "header.distance_offset=0.4")


# ---- one rank of the program, and what it used ---------------------------------------------------------------------


def as_rank(folder: Path, until_first_image: bool, arguments: list[str]) -> None:
    """Be one rank of the program, and write what it used to a file in `folder` when it ends."""
    from ssx_mpi.command_line import process

    used: dict[str, Any] = {}
    if until_first_image:
        _stop_at_first_image(used)
    try:
        process.run(arguments)
    finally:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used.update(peak_mb=usage.ru_maxrss / 1024, cpu=usage.ru_utime + usage.ru_stime)
        (folder / f"rank_{_rank()}.json").write_text(json.dumps(used))


def _rank() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))


def _stop_at_first_image(used: dict[str, Any]) -> None:
    """Have the program note clock and memory when it takes its first image in hand, and stop in good order."""
    from ssx_mpi.stages.stills import StillProcessor

    find_spots = StillProcessor.find_spots

    def first(self, image):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used.setdefault("first_image_at", time.time())
        used.setdefault("cpu_at_first_image", usage.ru_utime + usage.ru_stime)
        used.setdefault("memory_mb", _memory_mb())
        used.setdefault("peak_at_first_image_mb", usage.ru_maxrss / 1024)
        os.kill(os.getpid(), signal.SIGTERM)
        return find_spots(self, image)

    StillProcessor.find_spots = first  # type: ignore[method-assign]


def _memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


@dataclass(frozen=True)
class Job:
    """A run of the program that was started: `process`, and the `folder` of what its ranks used."""

    process: subprocess.Popen
    folder: Path

    def ranks(self, *statuses: int) -> list[dict[str, Any]]:
        """Wait for the end; what each rank used, in their order."""
        status = self.process.wait()
        if status not in (statuses or (0,)):
            sys.exit(f"the program ended with status {status}:\n{(self.folder / 'messages').read_text()}")
        files = sorted(self.folder.glob("rank_*.json"), key=lambda path: int(path.stem.split("_")[1]))
        return [json.loads(path.read_text()) for path in files]


def start(folder: Path, launcher: Iterable[str], arguments: Iterable[str], until_first_image: bool = False) -> Job:
    """Start the program by `launcher`; `folder` is its output folder's neighbour and must not be there yet."""
    folder.mkdir(parents=True)
    mode = "first" if until_first_image else "whole"
    command = [*launcher, sys.executable, __file__, "rank", str(folder), mode, *arguments]
    allowed = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe")
    environment = {**os.environ, **dict.fromkeys(allowed, "1")}
    command.append(f"output.directory={folder / 'run'}")
    with (folder / "messages").open("w") as messages:
        return Job(subprocess.Popen(command, env=environment, stdout=messages, stderr=messages), folder)


def simulate(file: Path, *arguments: str) -> None:
    """A simulated data set."""
    subprocess.run(
        [_program("ssx_mpi.simulate"), f"output.file={file}", *arguments], check=True, stdout=subprocess.DEVNULL
    )


def _program(name: str) -> str:
    """The program of this name that belongs to this Python."""
    return str(Path(sys.executable).with_name(name))


# ---- images a second, and memory -----------------------------------------------------------------------------------


def rates(stills: Path | None, repeats: int) -> None:
    """1 against 2 ranks, in turns: two runs of one rank side by side, then one run of two ranks, each on its own core.

    What is lost to memory and clock of a shared machine is lost to both. The geometry is given, so that the rate is
    that of the batches.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = {"simulated, 1 Mpx": _simulated(folder)}
        if stills is not None:
            data["thaumatin, 6 Mpx"] = _repeated_stills(stills, folder)
        print("| data | images, hits | one rank beside another, images/s | two ranks, images/s | efficiency |", end="")
        print(" peak memory of a rank: 1 of 1, 1 of 2, 2 of 2 (MB) |\n|---|---|---|---|---|---|")
        for name, arguments in data.items():
            print(f"| {name} | {_rates(folder / name.split(',')[0], arguments, repeats)} |", flush=True)


def _simulated(folder: Path) -> list[str]:
    simulate(folder / "lyso.nxs", "n_images=120", "hit_rate=0.35", "seed=3", *LYSOZYME)
    return [f"image={folder / 'lyso.nxs'}", f"reference_geometry={folder / 'truth.expt'}", *LYSOZYME]


def _repeated_stills(stills: Path, folder: Path, copies: int = 4) -> list[str]:
    """Parameters for `copies` times all stills in a folder, by links, with their geometry refined beforehand."""
    images = folder / "stills"
    images.mkdir()
    sources = sorted(p for p in stills.iterdir() if p.name.endswith((".cbf", ".cbf.bz2")))
    if not sources:
        sys.exit(f"{stills} has no .cbf or .cbf.bz2 files")
    for number, source in enumerate(sources):
        plain = images / f"still_{number + 1:04d}.cbf"
        if source.suffix == ".bz2":
            plain.write_bytes(bz2.decompress(source.read_bytes()))
        else:
            plain.symlink_to(source.resolve())
        for copy in range(1, copies):
            plain.with_name(f"still_{copy * len(sources) + number + 1:04d}.cbf").symlink_to(plain)
    geometry = [f"template={images}/still_####.cbf:1:{len(sources)}", *THAUMATIN, "steps=None"]
    start(folder / "geometry", ["mpiexec", "-n", "2"], geometry).ranks()
    refined = folder / "geometry/run/geometry_refinement/refined.expt"
    return [f"template={images}/still_####.cbf", f"reference_geometry={refined}", *THAUMATIN]


def _rates(folder: Path, arguments: list[str], repeats: int) -> str:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("this needs two cores")
    rows, peaks = [], []
    for repeat in range(repeats):
        alone = [
            start(folder / f"{repeat}_alone_{core}", ["taskset", "-c", str(core)], [*arguments, "nproc=1"])
            for core in cores
        ]
        single = [job.ranks()[0]["peak_mb"] for job in alone]
        together = start(folder / f"{repeat}_two", ["mpiexec", "-n", "2", "--bind-to", "core"], arguments)
        peaks.append((max(single), *(rank["peak_mb"] for rank in together.ranks())))
        status = [json.loads((job.folder / "run/ssx_mpi.json").read_text()) for job in (*alone, together)]
        rows.append([s["n_images"] / s["dispatch"]["seconds"] for s in status])
    counts = status[-1]["total"]["counts"]
    efficiency = statistics.median(two / (a + b) for a, b, two in rows)
    beside = ", ".join(f"{a:.2f} + {b:.2f}" for a, b, _ in rows)
    return (
        f"{counts['images']}, {counts['hits']} | {beside} | {', '.join(f'{two:.2f}' for *_, two in rows)} | "
        f"{efficiency:.3f} | {', '.join(f'{peak:.0f}' for peak in np.max(peaks, axis=0))}"
    )


# ---- the start -----------------------------------------------------------------------------------------------------


def starts(only: str) -> None:
    """From the start of `mpiexec` to the first image in hand on both ranks, and the memory for 100,000 images.

    The memory is what a rank has (and had at its peak) when it takes its first image in hand, less that of a run over
    a hundred images of the same kind, for each of the 100,000. The geometry is given, so that what earlier runs left of
    the batches has been looked at by then too.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("| 100,000 images | first image in hand (with 100 images) | CPU-s of rank 0 by then |", end="")
        print(" bytes an image (at the peak): rank 0 | rank 1 |\n|---|---|---|---|---|")
        for name, make in (
            ("in one HDF5 file", _one_file),
            ("in 4,000 HDF5 files of 25", _many_files),
            ("in 100,000 CBF files", _cbf_files),
        ):
            if only not in name:
                continue
            place = folder / name.replace(" ", "_")
            few, many = make(place / "few", 100), make(place / "many", 100_000)
            geometry = _geometry_of(few, place)
            base, shortest = _start(place / "run_few", [few, geometry])
            ranks, seconds = _start(place / "run_many", [many, geometry])
            memory = []
            for rank, before in zip(ranks, base, strict=True):
                kept, peak = (
                    (rank[key] - before[key]) * 2**20 / 1e5 for key in ("memory_mb", "peak_at_first_image_mb")
                )
                memory.append(f"{kept:.0f} ({peak:.0f})")
            cpu = f"{ranks[0]['cpu_at_first_image']:.1f} ({base[0]['cpu_at_first_image']:.1f})"
            print(f"| {name} | {seconds:.1f} s ({shortest:.1f} s) | {cpu} | {' | '.join(memory)} |", flush=True)
            shutil.rmtree(place)


def _start(folder: Path, arguments: list[str]) -> tuple[list[dict[str, Any]], float]:
    """What the two ranks used, and the seconds until both had their first image in hand."""
    began = time.time()
    job = start(folder, ["mpiexec", "-n", "2"], [*arguments, *LYSOZYME], until_first_image=True)
    ranks = job.ranks(75, 0, 3)
    return ranks, max(rank["first_image_at"] for rank in ranks) - began


def _geometry_of(name: str, folder: Path) -> str:
    """Parameter that gives the images of the parameter `name` their own geometry."""
    from ssx_mpi.images.experiment_maker import ExperimentMaker
    from ssx_mpi.images.sources import find_images
    from ssx_mpi.parameters.run_parameters import Source
    from ssx_mpi.records.files import write_json
    from ssx_mpi.stages.packing import pack

    images = find_images((Source(*name.split("=")),))
    write_json(folder / "own.expt", pack([ExperimentMaker(images).experiment(0)]))
    return f"reference_geometry={folder / 'own.expt'}"


def _detector(preset):
    from ssx_mpi.simulation.detector import FlatDetector

    middle = tuple(0.5 * preset.pixel_mm * n for n in preset.size)
    return FlatDetector(preset, distance_mm=70.0, beam_centre_mm=middle, wavelength=0.976)


def _one_file(folder: Path, n_images: int) -> str:
    """One NXmx file of frames of 32 x 24 pixels, of which only the first is written; the others read as zero."""
    import h5py

    from ssx_mpi.simulation import nexus_writer
    from ssx_mpi.simulation.simulation_parameters import DetectorPreset

    folder.mkdir(parents=True)
    detector = _detector(DetectorPreset("tiny", (32, 24), (1, 1), (0, 0), 2.0, 0.45, 16))
    none = np.zeros(detector.preset.shape, bool)
    layout = nexus_writer.Layout(folder / "images.nxs", n_images, n_images)
    nexus_writer.write_master(layout, detector, none, none, rotation_axis=False)
    with h5py.File(layout.master, "r+") as file:
        del file["entry/data/data"]
        shape = (n_images, *detector.preset.shape)
        data = file["entry/data"].create_dataset("data", shape, np.uint16, chunks=(1, *shape[1:]))
        data[0] = 1
    return f"image={layout.master}"


def _many_files(folder: Path, n_images: int) -> str:
    """Files of 25 images each: copies, not links, of one."""
    _one_file(folder / "first", 25)
    for number in range(n_images // 25):
        shutil.copyfile(folder / "first/images.nxs", folder / f"images_{number:05d}.nxs")
    return f"directory={folder}"


def _cbf_files(folder: Path, n_images: int) -> str:
    """A name for each image: hard links to one CBF file of the smallest detector that dxtbx knows."""
    from ssx_mpi.simulation import cbf_writer
    from ssx_mpi.simulation.simulation_parameters import DETECTORS

    folder.mkdir(parents=True)
    detector = _detector(DETECTORS["pilatus200k"])
    cbf_writer.write_cbf(folder / "one", np.ones(detector.preset.shape, np.int32), detector)
    for number in range(n_images):
        # a file may have only so many names
        if number % 10_000 == 0:
            source = folder / f"x_{number:06d}.cbf"
            shutil.copyfile(folder / "one", source)
        else:
            os.link(source, folder / f"x_{number:06d}.cbf")
    return f"template={folder}/x_######.cbf"


# ---- the truth -----------------------------------------------------------------------------------------------------


def truth() -> None:
    """A chip of 200 images with a wrong header, from images to merged intensities, beside what was simulated."""
    from ssx_mpi.simulation import truth as comparison

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        simulate(folder / "images/lyso.nxs", "n_images=200", "hit_rate=0.9", "seed=11", *WRONG_HEADER, *LYSOZYME)
        image = f"image={folder / 'images/lyso.nxs'}"
        start(folder / "fast", ["mpiexec", "-n", "2"], [image, *LYSOZYME]).ranks()
        print(
            "200 images of lysozyme, nine in ten with a crystal; in the header the beam centre is 0.36 mm and the "
            "distance 0.4 mm wrong"
        )
        print(comparison.table(comparison.compare_run(folder / "images", folder / "fast/run")))
        reduced = _reduce(folder / "fast/run", folder / "reduced")
        print(f"  {'CC of ssx_mpi.reduce with the true ones':<40s}{_cc_of_mtz(folder / 'images', reduced):.4f}")


def _reduce(run: Path, output: Path) -> Path:
    command = [_program("ssx_mpi.reduce"), f"directory={run}", f"output.folder={output}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output / "DataFiles/merged_full.mtz"


def _cc_of_mtz(truth_folder: Path, path: Path) -> float:
    """Correlation of the mean intensities of an .mtz file with the true ones."""
    from iotbx import mtz

    from ssx_mpi.simulation.truth import load_truth

    (merged,) = [a for a in mtz.object(str(path)).as_miller_arrays() if a.info().labels[0] == "IMEAN"]
    ours, true = merged.map_to_asu().common_sets(load_truth(truth_folder).intensities.map_to_asu())
    return float(np.corrcoef(ours.data().as_numpy_array(), true.data().as_numpy_array())[0, 1])


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        return as_rank(Path(sys.argv[2]), sys.argv[3] == "first", sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", "start", "truth"])
    parser.add_argument("stills", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=3, help="of rates")
    parser.add_argument("--only", default="", help="of start: a word of the name of the one row to measure")
    given = parser.parse_args()
    from ssx_mpi import dials_compat

    dials_compat.prepare()
    if given.what == "rates":
        rates(given.stills, given.repeats)
    elif given.what == "start":
        starts(given.only)
    else:
        truth()
    return None


if __name__ == "__main__":
    main()
