"""CPU time and agreement of the fast ellipsoid integration on the thaumatin stills.

    python benchmarks/integration.py                 agreement with the stored results of DIALS 3.30, all crystals
    python benchmarks/integration.py --dials 1       the same, and one crystal integrated by the installed DIALS as well

DIALS runs in this process, once with its own defaults and once with the model and the number of macro cycles that the
fast integration uses; the time to read the images is in neither column.
"""

from __future__ import annotations

import argparse
import bz2
import copy
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ssx_mpi import dials_compat

dials_compat.prepare()

import numpy as np  # noqa: E402
from dials.algorithms.integration.ssx.ellipsoid_integrate import EllipsoidIntegrator  # noqa: E402
from dials.array_family import flex  # noqa: E402
from dials.command_line import ssx_integrate  # noqa: E402
from dxtbx import flumpy  # noqa: E402
from dxtbx.model import ExperimentList  # noqa: E402

from ssx_mpi.images.frames import Frame  # noqa: E402
from ssx_mpi.stages.fast.fast_integration import FastEllipsoidIntegrator  # noqa: E402
from ssx_mpi.stages.still_results import Crystals  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HEADER = (
    "image  CPU s  reflections  common   CC(I)  CC(sig)  sum ratio  |dp|    cell      eigenvalues"  # agreement columns
)


def load_module(path: Path):
    """The module at `path`, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unpacked_images(data: Path, folder: Path) -> Path:
    for packed in sorted((data / "thaumatin_grid").glob("*.cbf.bz2")):
        (folder / packed.stem).write_bytes(bz2.decompress(packed.read_bytes()))
    return folder


def indexed_stills(loader, folder: Path) -> list[tuple[ExperimentList, flex.reflection_table]]:
    """One experiment list and reflection table a still; pixels without counts are trusted whatever the version."""
    experiments, reflections = loader.load_indexed(folder)
    stills = []
    for number, experiment in enumerate(experiments):
        for panel in experiment.detector:
            # before dxtbx 3.13 the lower end of the trusted range was not part of it, and these models are newer
            upper = panel.get_trusted_range()[1]
            panel.set_trusted_range((0 if dials_compat.dials_version() >= (3, 13) else -1, upper))
        table = reflections.select(reflections["id"] == number)
        table["id"] = flex.int(len(table), 0)
        for key in list(table.experiment_identifiers().keys()):
            del table.experiment_identifiers()[key]
        table.experiment_identifiers()[0] = experiment.identifier
        stills.append((ExperimentList([experiment]), table))
    return stills


def columns(table) -> dict[str, np.ndarray]:
    names = ("intensity.sum.value", "intensity.sum.variance", "partiality", "flags")
    found = {name: flumpy.to_numpy(table[name]) for name in names}
    return found | {"miller_index": np.array(table["miller_index"]).reshape(-1, 3)}


def agreement(ours: dict, theirs: dict) -> dict[str, float]:
    """Figures of merit over the reflections that both integrate; `common` is the share of theirs among ours."""
    row = {tuple(h): k for k, h in enumerate(map(tuple, ours["miller_index"]))}
    pairs = [(row[h], k) for k, h in enumerate(map(tuple, theirs["miller_index"])) if h in row]
    a, b = np.array(pairs).T
    summed = 1 << 8
    both = (ours["flags"][a] & summed != 0) & (theirs["flags"][b] & summed != 0)
    a, b = a[both], b[both]
    value, variance = (
        [ours[name][a].astype(float), theirs[name][b].astype(float)]
        for name in ("intensity.sum.value", "intensity.sum.variance")
    )
    return {
        "common": both.sum() / (theirs["flags"] & summed != 0).sum(),
        "cc": np.corrcoef(*value)[0, 1],
        "cc_sigma": np.corrcoef(*np.sqrt(variance))[0, 1],
        "ratio": value[0].sum() / value[1].sum(),
        "partiality": np.median(np.abs(ours["partiality"][a] - theirs["partiality"][b])),
    }


def describe(name: str, cpu: float, n: int, figures: dict, cell: float, eigenvalues: np.ndarray) -> str:
    spread = " ".join(f"{value:+.4f}" for value in eigenvalues)
    return (
        f"{name:>5}  {cpu:5.2f}  {n:11d}  {figures['common']:.4f}  {figures['cc']:.5f}  {figures['cc_sigma']:.5f}"
        f"  {figures['ratio']:9.4f}  {figures['partiality']:.4f}  {cell:.1e}   {spread}"
    )


def difference(experiment, cell, sigma) -> tuple[float, np.ndarray]:
    """Largest relative difference of cell edges, and those of the ellipsoid's eigenvalues."""
    ours = np.array(experiment.crystal.get_unit_cell().parameters())
    eigenvalues = np.linalg.eigvalsh(np.array(experiment.profile.sigma()))
    return np.abs(ours[:3] / np.array(cell)[:3] - 1).max(), eigenvalues / np.linalg.eigvalsh(np.array(sigma)) - 1


def run_dials(params, experiments, table) -> tuple[float, object, dict]:
    start = time.process_time()
    experiment, integrated, _ = EllipsoidIntegrator(params).run(copy.deepcopy(experiments)[0], table.copy())
    return time.process_time() - start, experiment, columns(integrated)


def one_crystal(experiments, table, number: int) -> tuple[ExperimentList, flex.reflection_table]:
    """One crystal of several on an image and its spots, numbered as the only one."""
    spots = table.select(table["id"] == number)
    for key in list(spots.experiment_identifiers().keys()):
        del spots.experiment_identifiers()[key]
    spots["id"] = flex.int(len(spots), 0)
    spots.experiment_identifiers()[0] = experiments[number].identifier
    return ExperimentList([experiments[number]]), spots


def try_dials(params, experiments, table) -> tuple[float, flex.reflection_table | None]:
    """CPU-seconds and reflections of DIALS for one crystal; None where DIALS gives it up."""
    start = time.process_time()
    try:
        _, integrated, _ = EllipsoidIntegrator(params).run(copy.deepcopy(experiments)[0], table.copy())
    except RuntimeError:
        integrated = None
    return time.process_time() - start, integrated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dials", type=int, default=0, metavar="N", help="crystals to integrate with DIALS as well")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real data")
    parser.add_argument("--images", type=Path, help="folder with the unpacked stills")
    arguments = parser.parse_args()
    loader = load_module(arguments.data / "thaumatin_dials_3_30" / "load.py")
    reference, crystals = loader.load_integrated(), loader.crystals()["integrated"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.images or unpacked_images(arguments.data, Path(scratch))
        stills = indexed_stills(loader, folder)
        compare_with_stored(stills, reference, crystals)
        # the weakest first: their times are the smallest that DIALS needs
        for experiments, table in stills[::-1][: arguments.dials]:
            compare_with_dials(experiments, table)


def fast(experiments, table):
    params = ssx_integrate.working_phil.extract()
    imageset = experiments[0].imageset
    data = [flumpy.to_numpy(panel) for panel in imageset.get_raw_data(0)]
    mask = [flumpy.to_numpy(panel) for panel in imageset.get_mask(0)]
    frame = Frame("", 0, tuple(data), tuple(data), tuple(mask))
    start = time.process_time()
    result = FastEllipsoidIntegrator(params).integrate(Crystals(experiments, table), frame)
    return time.process_time() - start, result


def stored_rows(stills, reference, crystals) -> Iterator[dict]:
    """Each still integrated, and how it agrees with the stored results; one that fails has only a reason."""
    for row, (image, (experiments, table)) in enumerate(zip(crystals["image"], stills)):
        cpu, result = fast(experiments, table)
        if result.failures:
            yield {"image": image, "cpu": cpu, "reason": result.failures[0][1]}
            continue
        theirs = {name: column[reference["image"] == image] for name, column in reference.items()}
        figures = agreement(columns(result.reflections), theirs)
        cell, sigma = difference(result.experiments[0], crystals["cell"][row], crystals["profile"][row]["sigma"])
        yield {
            "image": image,
            "cpu": cpu,
            "n": len(result.reflections),
            "figures": {name: float(value) for name, value in figures.items()},
            "cell": float(cell),
            "eigenvalues": sigma.tolist(),
        }


def compare_with_stored(stills, reference, crystals) -> None:
    print("Against DIALS 3.30 on the same indexed crystals:")
    print(HEADER)
    rows = list(stored_rows(stills, reference, crystals))
    for r in rows:
        if "reason" in r:
            print(f"{r['image']:5d}  {r['cpu']:5.2f}  {r['reason']}")
        else:
            print(describe(str(r["image"]), r["cpu"], r["n"], r["figures"], r["cell"], r["eigenvalues"]))
    times = [r["cpu"] for r in rows if "reason" not in r]
    print(f"{len(times)} crystals integrated, {len(rows) - len(times)} failed, {np.mean(times):.2f} CPU s a crystal\n")


def side_by_side(experiments, table) -> dict:
    """One crystal by both: CPU-seconds of DIALS with its defaults, and with the same model and macro cycles.

    The figures of merit are those against the latter.
    """
    cpu, result = fast(experiments, table)
    params = ssx_integrate.working_phil.extract()
    default_cpu = run_dials(params, experiments, table)[0]
    params.profile.ellipsoid.rlp_mosaicity.model = "simple6"
    params.profile.ellipsoid.refinement.n_macro_cycles = 3
    same_cpu, experiment, theirs = run_dials(params, experiments, table)
    ours = columns(result.reflections)
    figures = {name: float(value) for name, value in agreement(ours, theirs).items()}
    cell, eigenvalues = difference(
        result.experiments[0], experiment.crystal.get_unit_cell().parameters(), experiment.profile.sigma()
    )
    return {
        "name": experiments[0].identifier,
        "cpu": cpu,
        "defaults": default_cpu,
        "same": same_cpu,
        "n": len(ours["flags"]),
        "figures": figures,
        "cell": float(cell),
        "eigenvalues": eigenvalues.tolist(),
    }


def compare_with_dials(experiments, table) -> None:
    r = side_by_side(experiments, table)
    version = ".".join(map(str, dials_compat.dials_version()))
    print(f"{r['name']} side by side with DIALS {version}: fast {r['cpu']:.2f} CPU s, DIALS", end=" ")
    print(f"with its defaults {r['defaults']:.1f} ({r['defaults'] / r['cpu']:.0f} times as much)", end=", ")
    print(f"with the same model and cycles {r['same']:.1f} ({r['same'] / r['cpu']:.0f} times)")
    print(HEADER)
    print(describe("", r["cpu"], r["n"], r["figures"], r["cell"], r["eigenvalues"]), "\n")


if __name__ == "__main__":
    main()
