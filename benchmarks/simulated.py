"""The fast engine and DIALS on the same simulated stills, against the truth: two parts of ``benchmarks/engine.py``.

:func:`stills` indexes and integrates images with the true geometry by both. :func:`chip` is a data set with a wrong
header, indexed by the fast engine with the geometry that it refines, and then integrated by the fast engine and by
``dials.ssx_integrate``, each with two models, and reduced by ``ssx_mpi.reduce`` and by DIALS. What is done is kept in a
folder, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import indexing
import integration
import main_job
import numpy as np
import reduction
import spotfinding

from ssx_mpi.simulation import truth as true

N_STILLS = 64


# ---- stills with the true geometry ----------------------------------------------------------------------------------


def stills(folder: Path, n_images: int) -> dict:
    """Indexing and integration of simulated stills with the true geometry by both, compared with the truth.

    Both index the same strong spots; both integrate the crystals that the fast engine indexed.
    """
    if not (folder / "truth.json").exists():
        _simulate(folder)
    truth = true.load_truth(folder)
    geometry = truth.geometry
    images = _simulated_images(folder, n_images)
    processed = [lattice.image < len(images) for lattice in truth.lattices]
    truth = replace(
        truth,
        lattices=tuple(x for x, done in zip(truth.lattices, processed) if done),
        visible_spots=tuple(x for x, done in zip(truth.visible_spots, processed) if done),
    )
    numbers: dict[str, Any] = {"images": len(images)}
    observed, errors = {}, {}
    for engine in ("fast", "dials"):
        lattices = [true.Lattice(i["image"], np.array(a)) for i in images for a in i[engine]["A"]]
        matches = true.match(truth, lattices)
        errors[engine] = {t: e for t, e in zip(matches.true.tolist(), matches.error_deg.tolist()) if t >= 0}
        observed[engine] = true.read_observations(sorted(folder.glob(f"{engine}_*.refl")))
        result = true.compare(truth, lattices, geometry, observed[engine])
        numbers[engine] = asdict(result) | {
            "index_s": sum(i[engine]["index_s"] for i in images) / len(images),
            "integrate_s": sum(i[engine]["integrate_s"] for i in images) / sum(len(i["fast"]["A"]) for i in images),
            "integrated": sum(i[engine]["integrated"] for i in images),
            "mean_error_deg": float(np.mean(list(errors[engine].values()))),
        }
    both = errors["fast"].keys() & errors["dials"].keys()
    for engine, other in (("fast", "dials"), ("dials", "fast")):
        numbers[engine]["closer"] = sum(errors[engine][t] < errors[other][t] for t in both)
        numbers[engine] |= _shared(truth, observed[engine], observed[other])
    return numbers


def _simulate(folder: Path) -> None:
    from ssx_mpi.parallel.communicator import SerialCommunicator
    from ssx_mpi.simulation import simulation_parameters as p
    from ssx_mpi.simulation.data_set import simulate

    folder.mkdir(exist_ok=True)
    wanted = p.SimulationParameters(
        n_images=N_STILLS,
        seed=12,
        hit_rate=1.0,
        lattices=(0.75, 0.25),
        crystal=p.CrystalParameters(d_min=2.0),
        header=p.HeaderParameters((0.0, 0.0), 0.0),
        output=p.OutputParameters(folder / "lysozyme.nxs", compression="gzip"),
    )
    simulate(wanted, SerialCommunicator())


def _simulated_images(folder: Path, n_images: int) -> list[dict]:
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
    for number, experiment in enumerate(imported[:n_images]):
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

        from ssx_mpi.images.frames import FrameReader
        from ssx_mpi.stages.fast.fast_indexing import FastIndexer
        from ssx_mpi.stages.fast.fast_spotfinding import FastSpotFinder

        self.index_scope, self.integrate_scope = index_scope, integrate_scope
        self.read = FrameReader(share_with_dxtbx=True)
        self.finder = FastSpotFinder(phil_scope.fetch(phil.parse(spotfinding.PARAMETERS)).extract())
        self.indexer = FastIndexer(index_scope.extract())

    def both(self, folder: Path, number: int, experiment: Any) -> dict:
        """Numbers of both on one image; the integrated tables are written into the folder."""
        frame = self.read(experiment.imageset)
        strong = self.finder.find(experiment, frame)
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
        from ssx_mpi.stages.fast.fast_integration import FastEllipsoidIntegrator

        crystals = self.indexer.index(experiment, strong)
        experiments, table = crystals
        own["integrate_s"], result = spotfinding.timed(
            FastEllipsoidIntegrator(self.integrate_scope.extract()).integrate, crystals, frame
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


# ---- on the same reflections ----------------------------------------------------------------------------------------


def _shared(truth: true.Truth, observations: true.Observations, others: true.Observations) -> dict[str, float]:
    """Correlation to the truth, one scale a crystal, on unique reflections that the others have, and on observations.

    On the former all observations count, from whichever crystal; the latter are the same reflections of the same
    crystals.
    """
    rows = true.unique_rows(truth, observations.hkl)
    same = observations.select(np.isin(rows, true.unique_rows(truth, others.hkl)))
    theirs = set(_keys(others))
    common = observations.select(np.array([key in theirs for key in _keys(observations)]))
    n_same, _, cc_same, _ = true.merging_correlations(truth, same)
    return {
        "n_same_unique": n_same,
        "cc_same_unique": cc_same,
        "n_common": len(common.intensity),
        "cc_common": true.merging_correlations(truth, common)[2],
    }


def _keys(observations: true.Observations) -> list[tuple]:
    names = [observations.identifiers[number] for number in observations.crystal]
    return [(name, *hkl) for name, hkl in zip(names, observations.hkl.tolist())]


# ---- a chip with a wrong header -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Integration:
    """One way to integrate the crystals of the chip: by the fast engine, or by DIALS with parameters of its own."""

    title: str
    engine: str
    parameters: tuple[str, ...] = ()


INTEGRATIONS = {
    "fast": Integration("fast", "fast"),
    "fast_angular": Integration(
        "fast, simple6angular1", "fast", ("integration.ellipsoid.rlp_mosaicity=simple6angular1",)
    ),
    "dials": Integration("DIALS", "dials"),
    "dials_simple6": Integration("DIALS, simple6", "dials", ("profile.ellipsoid.rlp_mosaicity.model=simple6",)),
}
# Å; of the strong reflections, those at lower resolution tell most about the model
LOW_RESOLUTION = 4.0
SHARES = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0)


def chip(folder: Path) -> dict:
    """Integration of the same indexed crystals of 200 images by the fast engine and by DIALS, merged in three ways."""
    folder.mkdir(exist_ok=True)
    # identifiers of crystals come from the path of their image
    folder = folder.resolve()
    images = folder / "images"
    if not (images / "truth.json").exists():
        wanted = ("n_images=200", "hit_rate=0.9", "seed=11", "output.compression=gzip")
        main_job.simulate(images / "lyso.nxs", *wanted, *main_job.WRONG_HEADER, *main_job.LYSOZYME)
    truth = true.load_truth(images)
    numbers: dict[str, Any] = {}
    observed, errors = {}, {}
    for name, how in INTEGRATIONS.items():
        run = _integrated(folder, name, how)
        seconds = json.loads((run / "seconds.json").read_text())
        numbers[name] = asdict(true.compare_run(images, run)) | {"title": how.title, "integrate_s": seconds}
        experiments, reflections = true.run_files(run)
        found = true.read_observations(reflections)
        assert found is not None
        observed[name], errors[name] = found, _orientation_errors(truth, experiments)
        numbers[name]["ratios"] = _ratios_to_truth(truth, found)
    indexed = _orientation_errors(truth, sorted((folder / "fast").glob("batch_*/indexed.expt")))
    numbers["indexed_error_deg"] = float(np.median(list(indexed.values())))
    for name, found in observed.items():
        numbers[name] |= _shared(truth, found, observed["dials"])
        numbers[name]["cc_common_dials"] = _shared(truth, observed["dials"], found)["cc_common"]
        both = errors[name].keys() & errors["dials"].keys()
        closer = sum(errors[name][lattice] < errors["dials"][lattice] for lattice in both)
        numbers[name] |= {"compared": len(both), "closer": closer}
    merged = {name: _reduced(folder, name) for name in INTEGRATIONS}
    for program in ("ssx_mpi", "dials"):
        files = {name: merged[name][program] for name in merged}
        common = reduction.against_truth(images / "truth.mtz", files)
        for name, path in files.items():
            (own,) = reduction.against_truth(images / "truth.mtz", {name: path}).values()
            numbers[name][program] = {
                "cc": own[0],
                "n": own[2],
                "cc_common": common[name][0],
                "n_common": common[name][2],
            }
    return numbers


def _orientation_errors(truth: true.Truth, experiments: list[Path]) -> dict[int, float]:
    """Degrees by which each true lattice that was found is off, by its number."""
    lattices = [lattice for path in experiments for lattice in true.read_experiments(path)[0]]
    matches = true.match(truth, lattices)
    return {t: e for t, e in zip(matches.true.tolist(), matches.error_deg.tolist()) if t >= 0}


def _integrated(folder: Path, name: str, how: Integration) -> Path:
    """Folder with the integrated crystals; those of DIALS are the indexed ones of the first run of the fast engine."""
    run = folder / name
    note = run / "seconds.json"
    if note.exists():
        return run
    if how.engine == "fast":
        command = [sys.executable, "-m", "ssx_mpi", f"image={folder / 'images/lyso.nxs'}", "nproc=1"]
        command += [*main_job.LYSOZYME, f"output.directory={run}", *how.parameters]
        if name != "fast":
            command.append(f"reference_geometry={folder / 'fast/geometry_refinement/refined.expt'}")
        reduction.cpu_of(command, folder)
        images = [image for path in run.glob("batch_*/images.json") for image in json.loads(path.read_text())]
        seconds = sum(image["seconds"].get("integrate", 0.0) for image in images)
    else:
        run.mkdir(exist_ok=True)
        indexed = [str(path) for path in sorted((folder / "fast").glob("batch_*/indexed.*"))]
        command = ["dials.ssx_integrate", *indexed, "nproc=1", "algorithm=ellipsoid", "output.html=None"]
        seconds = reduction.cpu_of([*command, *how.parameters], run)
    note.write_text(json.dumps(seconds))
    return run


def _reduced(folder: Path, name: str) -> dict[str, Path]:
    """Merged files of the integrated crystals, by ssx_mpi.reduce and by dials.scale and dials.merge."""
    experiments, reflections = true.run_files(folder / name)
    ours, theirs = folder / f"{name}_reduced", folder / f"{name}_scaled"
    if not (ours / "DataFiles/merged_full.mtz").exists():
        files = map(str, experiments)
        command = [sys.executable, "-m", "ssx_mpi.command_line.reduce", *files, f"output.folder={ours}"]
        reduction.cpu_of(command, folder)
    reduction.run_dials("lysozyme", [*experiments, *reflections], theirs)
    return {"ssx_mpi": ours / "DataFiles/merged_full.mtz", "dials": theirs / "merged.mtz"}


def _ratios_to_truth(truth: true.Truth, observations: true.Observations) -> list[float]:
    """Median ratio of strong intensities at low resolution to what is expected of truth and partiality, by partiality.

    Each crystal is scaled to the truth by all its reflections. Strong is above 10 sigmas.
    """
    array = truth.intensities.map_to_asu()
    rows = true.unique_rows(truth, observations.hkl)
    observations, rows = observations.select(rows >= 0), rows[rows >= 0]
    expected = array.data().as_numpy_array()[rows] * observations.share
    crystal, counts = observations.crystal, observations.intensity
    scale = np.bincount(crystal, counts * expected) / np.maximum(np.bincount(crystal, expected**2), 1e-12)
    ratio = counts / (scale[crystal] * expected)
    strong = (counts > 10 * np.sqrt(observations.variance)) & (
        array.d_spacings().data().as_numpy_array()[rows] > LOW_RESOLUTION
    )
    bins = [strong & (observations.share >= low) & (observations.share < high) for low, high in pairwise(SHARES)]
    return [float(np.median(ratio[chosen])) for chosen in bins]
