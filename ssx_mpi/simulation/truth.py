"""How a processed run compares with the truth of the simulation that it processed.

Read are what :mod:`ssx_mpi.simulation.data_set` wrote, and the ``batch_*`` of a run (or the integrated or indexed files
of DIALS programs in one folder). The program is ``ssx_mpi.compare``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi.kernels.still_simulation import polarization_factor
from ssx_mpi.simulation.panel_errors import PanelErrors, panel_errors, table_rows

# farther from every true lattice of its image than this, an indexed lattice is false
FALSE_ABOVE_DEG = 1.0
# hits with fewer visible spots than this need not be indexed
ENOUGH_SPOTS = 15
# below this a sum over the partiality is mostly noise
SMALLEST_PARTIALITY = 0.25


@dataclass(frozen=True)
class Lattice:
    """A crystal on image `image` (0-based) with setting matrix `A` (3, 3)."""

    image: int
    A: np.ndarray


@dataclass(frozen=True)
class Geometry:
    """Where the beam meets the plane of the first panel, (x, y) from its corner, and its distance; mm.

    `detector` is the dxtbx model.
    """

    beam_centre_mm: tuple[float, float]
    distance_mm: float
    detector: Any = None


@dataclass(frozen=True)
class Truth:
    """What was simulated.

    Attributes
    ----------
    lattices
        In the order of truth.expt.
    visible_spots
        For each lattice how many spots stand out of the noise.
    geometry
        The true one.
    intensities
        cctbx array of the true merged intensities.
    mates
        Of Friedel mates apart, where atoms scatter anomalously; otherwise None.
    """

    lattices: tuple[Lattice, ...]
    visible_spots: tuple[int, ...]
    geometry: Geometry
    intensities: Any
    mates: Any = None


@dataclass(frozen=True)
class Reduced:
    """The ``merged.mtz`` of a run against the true intensities.

    Attributes
    ----------
    n_merged
        Unique reflections in it.
    d_min
        Its resolution, angstrom.
    multiplicity
        Observations to a reflection.
    cc_truth
        Correlation of its intensities with the true ones, in the setting where that is best.
    deviation
        Robust width (from the quartiles) of the differences to the true intensities, on a common scale, over their
        sigmas: 1 where the sigmas are right.
    n_pairs, cc_anomalous
        Friedel pairs, and the correlation of their differences with the true ones; None where no atom scatters
        anomalously.
    """

    n_merged: int
    d_min: float
    multiplicity: float
    cc_truth: float
    deviation: float
    n_pairs: int = 0
    cc_anomalous: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A run measured against the truth; lattices are matched by orientation, up to the symmetry of the lattice.

    Attributes
    ----------
    hits, hits_indexed
        Images with 15 visible spots or more, and those of them with a lattice that is right.
    true_lattices, found_lattices
        Lattices with 15 visible spots or more, and those of them that were found.
    lattices
        Lattices of the run.
    false_lattices
        Those farther than a degree from any true one on their image.
    duplicate_lattices
        Right ones beyond the first for the same true lattice.
    orientation_error_deg
        Median over the lattices that are right; nan without any.
    beam_centre_error_mm, distance_error_mm
        Of the run's detector against the true one.
    n_observations, n_merged
        Integrated reflections that were merged, and unique ones that came of them.
    cc_truth, cc_truth_scaled
        Correlation of merged and true intensities: as they are, and with one scale per crystal; nan if not integrated.
    cc_counting
        What the second could be at most: with no errors but those of counting.
    reduced
        The run's own merged intensities against the true ones; None where it has none.
    panels
        Errors of the panels of a detector that has many; beam centre and distance are then off by the mean of these.
    """

    hits: int
    hits_indexed: int
    true_lattices: int
    found_lattices: int
    lattices: int
    false_lattices: int
    duplicate_lattices: int
    orientation_error_deg: float
    beam_centre_error_mm: float
    distance_error_mm: float
    n_observations: int
    n_merged: int
    cc_truth: float
    cc_truth_scaled: float
    cc_counting: float
    reduced: Reduced | None = None
    panels: PanelErrors | None = None


def load_truth(folder: Path) -> Truth:
    """Read the truth that stands beside simulated images."""
    from iotbx import mtz

    lattices, geometry = read_experiments(folder / "truth.expt")
    images = json.loads((folder / "truth.json").read_text())["images"]
    visible = tuple(n for image in images for n in image["visible_spots"])
    arrays = {a.info().labels[0]: a for a in mtz.object(str(folder / "truth.mtz")).as_miller_arrays()}
    intensities, mates = arrays["I"], arrays.get("I(+)")
    return Truth(tuple(lattices), visible, geometry, intensities, mates)


def read_experiments(path: Path) -> tuple[list[Lattice], Geometry]:
    """Lattices and geometry of an ``.expt`` file with simulated images.

    The file is read as the JSON that it is: that opens no image, and is the same for every version of DIALS.

    Raises
    ------
    ValueError
        When an experiment does not say which image it belongs to.
    """
    from dxtbx.model import BeamFactory, DetectorFactory

    content = json.loads(path.read_text())
    lattices = []
    for experiment in content["experiment"]:
        if "crystal" not in experiment:
            continue
        crystal = content["crystal"][experiment["crystal"]]
        real = np.array([crystal[f"real_space_{axis}"] for axis in "abc"])
        lattices.append(Lattice(_image_index(experiment, content, path), np.linalg.inv(real)))
    detector = DetectorFactory.from_dict(content["detector"][0])
    panel = detector[0]
    s0 = BeamFactory.from_dict(content["beam"][0]).get_s0()
    return lattices, Geometry(tuple(panel.get_beam_centre(s0)), panel.get_directed_distance(), detector)


def _image_index(experiment: dict, content: dict, path: Path) -> int:
    """0-based index of an experiment's image, from its scan, its place in an HDF5 file, or the number in its name."""
    if "scan" in experiment:
        return int(content["scan"][experiment["scan"]]["image_range"][0]) - 1
    image_set = content["imageset"][experiment["imageset"]]
    indices = image_set.get("single_file_indices") or []
    if len(indices) == 1:
        return int(indices[0])
    number = re.search(r"(\d+)\.\w+$", str((image_set.get("images") or [""])[0]))
    if not number:
        raise ValueError(f"{path}: cannot tell the image of experiment {experiment.get('identifier')}")
    return int(number.group(1)) - 1


def lattice_rotations(unit_cell, space_group) -> np.ndarray:
    """Proper rotations of the lattice (n, 3, 3), acting on Miller indices: all ways to index it alike."""
    from cctbx import crystal
    from cctbx.sgtbx import lattice_symmetry

    symmetry = crystal.symmetry(unit_cell=unit_cell, space_group=space_group, assert_is_compatible_unit_cell=False)
    to_niggli = symmetry.change_of_basis_op_to_niggli_cell()
    group = lattice_symmetry.group(symmetry.change_basis(to_niggli).unit_cell(), max_delta=1.4)
    operations = group.change_basis(to_niggli.inverse()).build_derived_acentric_group().all_ops()
    rotations = np.array([op.r().as_double() for op in operations]).reshape(-1, 3, 3)
    return np.unique(rotations.round(6), axis=0).transpose(0, 2, 1)


def misorientation_deg(A: np.ndarray, B: np.ndarray, rotations: np.ndarray) -> float:
    """Smallest rotation, in degrees, that takes the lattice `B` onto `A` under any of the `rotations`.

    For each of them A W B⁻¹ is a rotation but for the difference of the cells, which the nearest rotation (by singular
    value decomposition, the polar decomposition) leaves out.
    """
    u, _, vt = np.linalg.svd(A @ rotations @ np.linalg.inv(B))
    handed = np.linalg.det(u @ vt)
    trace = np.trace(u @ vt, axis1=1, axis2=2)
    cosine = np.where(handed > 0, (trace - 1) / 2, -1.0)
    return float(np.degrees(np.arccos(np.clip(cosine.max(), -1, 1))))


@dataclass(frozen=True)
class Matches:
    """Lattices of a run against the true ones: which it is (-1: none) and how far, degrees."""

    true: np.ndarray
    error_deg: np.ndarray


def match(truth: Truth, lattices: Iterable[Lattice]) -> Matches:
    """For each lattice of a run the nearest true one on its image, if within a degree."""
    array = truth.intensities
    rotations = lattice_rotations(array.unit_cell(), array.space_group())
    on_image: dict[int, list[int]] = {}
    for i, lattice in enumerate(truth.lattices):
        on_image.setdefault(lattice.image, []).append(i)
    true, error = [], []
    for lattice in lattices:
        angles = [
            (misorientation_deg(lattice.A, truth.lattices[i].A, rotations), i) for i in on_image.get(lattice.image, [])
        ]
        angle, i = min(angles, default=(180.0, -1))
        true.append(i if angle <= FALSE_ABOVE_DEG else -1)
        error.append(angle)
    return Matches(np.array(true, int), np.array(error))


@dataclass(frozen=True)
class Observations:
    """Integrated reflections of many crystals: indices (n, 3), and (n,) crystal number, counts, variance and share.

    The share of the full intensity that was recorded is partiality times polarization factor. Crystal k has the
    identifier `identifiers[k]`.
    """

    hkl: np.ndarray
    crystal: np.ndarray
    intensity: np.ndarray
    variance: np.ndarray
    share: np.ndarray
    identifiers: tuple[str, ...] = ()

    def select(self, which: np.ndarray) -> Observations:
        """Those of the observations that the (n,) bool array `which` chooses."""
        hkl, crystal, intensity = self.hkl[which], self.crystal[which], self.intensity[which]
        return Observations(hkl, crystal, intensity, self.variance[which], self.share[which], self.identifiers)


def read_observations(paths: Iterable[Path]) -> Observations | None:
    """Summation intensities of ``.refl`` files with a partiality that is worth dividing by; None without files.

    The beam is taken to be along -z and polarized horizontally, as the simulator has it and dxtbx supposes.
    """
    from dials.array_family import flex

    parts: list[tuple[np.ndarray, ...]] = []
    identifiers: list[str] = []
    for path in paths:
        table = flex.reflection_table.from_file(str(path))
        if "partiality" not in table or not len(table):
            continue
        ids = table["id"].as_numpy_array()
        partiality = table["partiality"].as_numpy_array()
        good = table.get_flags(table.flags.integrated_sum).as_numpy_array() & (partiality > SMALLEST_PARTIALITY)
        variance = table["intensity.sum.variance"].as_numpy_array()
        good &= variance > 0
        hkl = table["miller_index"].as_vec3_double().as_double().as_numpy_array().reshape(-1, 3)
        intensity = table["intensity.sum.value"].as_numpy_array()
        s1 = table["s1"].as_double().as_numpy_array().reshape(-1, 3)
        share = partiality * polarization_factor(s1, np.array([0.0, 0.0, -1.0]), np.array([0.0, 1.0, 0.0]), 0.999)
        number = ids[good] + len(identifiers)
        parts.append((hkl[good].astype(int), number, intensity[good], variance[good], share[good]))
        known = dict(zip(table.experiment_identifiers().keys(), table.experiment_identifiers().values()))
        identifiers += [known.get(k, "") for k in range(int(ids.max()) + 1)]
    if not any(len(part[0]) for part in parts):
        return None
    hkl, crystal, intensity, variance, share = (np.concatenate(column) for column in zip(*parts))
    return Observations(hkl, crystal, intensity, variance, share, tuple(identifiers))


def unique_rows(truth: Truth, hkl: np.ndarray) -> np.ndarray:
    """Row (n,) of each reflection of `hkl` (n, 3) in the true intensities, in their asymmetric unit; -1 without one."""
    from cctbx import miller

    from ssx_mpi.stages.flex_arrays import to_miller_index

    array = truth.intensities.map_to_asu()
    row = {index: i for i, index in enumerate(array.indices())}
    asu = miller.set(array, to_miller_index(hkl), anomalous_flag=False).map_to_asu().indices()
    return np.array([row.get(index, -1) for index in asu], dtype=np.int64)


def merge(
    unique: np.ndarray, observations: Observations, scale: np.ndarray, n_unique: int
) -> tuple[np.ndarray, np.ndarray]:
    """Σ I / Σ s p for each unique reflection, and Σ s p, p being the share recorded.

    Parameters
    ----------
    unique : (n,) int64
        Unique reflection of each observation.
    scale : (n_crystals,) float64
        Scale s of each crystal.
    n_unique
        Number of unique reflections.
    """
    expected = scale[observations.crystal] * observations.share
    total = np.bincount(unique, observations.intensity, n_unique)
    weight = np.bincount(unique, expected, n_unique)
    return total / np.where(weight > 0, weight, np.inf), weight


def crystal_scales(unique: np.ndarray, observations: Observations, d_star_sq: np.ndarray) -> np.ndarray:
    """One scale per crystal, from the observations alone.

    First from Wilson's statistics: a crystal's hundreds of reflections have the mean intensity of their resolution, and
    that works for crystals that share no reflection too. Then merge and scale by turns, each scale being
    Σ I M p / Σ (M p)² with the merged intensities M and the shares p: what crystals have in common refines the first
    answer.

    Parameters
    ----------
    unique : (n,) int64
        Unique reflection of each observation.
    d_star_sq : (n_unique,) float64
        1/d² of the unique reflections, Å⁻².
    """
    crystal, counts, share = observations.crystal, observations.intensity, observations.share
    n_crystals = int(crystal.max()) + 1

    def ratio(above: np.ndarray, below: np.ndarray, group: np.ndarray, n: int) -> np.ndarray:
        total = np.bincount(group, below, n)
        return np.maximum(np.bincount(group, above, n) / np.where(total > 0, total, np.inf), 1e-6)

    n_shells = max(1, len(unique) // 200)
    edges = np.quantile(d_star_sq[unique], np.linspace(0, 1, n_shells + 1)[1:-1])
    shell = np.searchsorted(edges, d_star_sq[unique])
    scale = np.ones(n_crystals)
    for _ in range(5):
        mean = ratio(counts, scale[crystal] * share, shell, n_shells)
        scale = ratio(counts / mean[shell], share, crystal, n_crystals)
    for _ in range(10):
        expected = merge(unique, observations, scale, len(d_star_sq))[0][unique] * share
        scale = ratio(counts * expected, expected**2, crystal, n_crystals)
    return scale / np.median(scale)


def merging_correlations(truth: Truth, observations: Observations) -> tuple[int, float, float, float]:
    """How the merged intensities correlate with the truth.

    Returns
    -------
    n_merged : int
        Unique reflections merged.
    unscaled, scaled : float
        Correlation without scales, and with one per crystal.
    counting : float
        The second if the errors were those of counting alone. With merged intensities k I + e and a mean variance N of
        e from counting it is sqrt(V / (V + N)), V being the variance of k I.
    """
    array = truth.intensities.map_to_asu()
    unique = unique_rows(truth, observations.hkl)
    observations, unique = observations.select(unique >= 0), unique[unique >= 0]
    true = array.data().as_numpy_array()
    scales = crystal_scales(unique, observations, array.d_star_sq().data().as_numpy_array())
    unscaled, weight = merge(unique, observations, np.ones(len(scales)), len(true))
    seen = weight > 0
    scaled, weight = merge(unique, observations, scales, len(true))
    noise = np.bincount(unique, observations.variance, len(true))[seen] / weight[seen] ** 2
    slope, _ = np.polyfit(true[seen], scaled[seen], 1)
    signal = slope**2 * np.var(true[seen])
    return (
        int(seen.sum()),
        float(np.corrcoef(unscaled[seen], true[seen])[0, 1]),
        float(np.corrcoef(scaled[seen], true[seen])[0, 1]),
        float(np.sqrt(signal / (signal + noise.mean()))),
    )


def compare_merged(truth: Truth, path: Path) -> Reduced:
    """Measure merged intensities, as ``merged.mtz`` of a run has them, against the truth."""
    from iotbx import mtz

    from ssx_mpi.stages.flex_arrays import from_miller_index

    columns = {array.info().labels[0]: array for array in mtz.object(str(path)).as_miller_arrays()}
    array, true = columns["IMEAN"], truth.intensities.map_to_asu()
    hkl = from_miller_index(array.indices())
    intensity, sigma = array.data().as_numpy_array(), array.sigmas().as_numpy_array()
    best, setting = (-np.inf, np.nan), np.eye(3)
    for rotation in lattice_rotations(true.unit_cell(), true.space_group()):
        rows = unique_rows(truth, np.rint(hkl @ rotation.T))
        known = rows >= 0
        ours, theirs, error = intensity[known], true.data().as_numpy_array()[rows[known]], sigma[known]
        scale = np.sum(ours * theirs / error**2) / np.sum((theirs / error) ** 2)
        low, high = np.quantile((ours - scale * theirs) / error, (0.25, 0.75))
        found = (float(np.corrcoef(ours, theirs)[0, 1]), float(high - low) / 1.349)
        if found > best:
            best, setting = found, rotation
    multiplicity = float(np.mean(list(columns["N"].data())))
    reduced = Reduced(len(hkl), float(array.d_min()), multiplicity, *best)
    if truth.mates is None or "I(+)" not in columns:
        return reduced
    n_pairs, cc = anomalous_correlation(truth.mates, columns["I(+)"], setting)
    return replace(reduced, n_pairs=n_pairs, cc_anomalous=cc)


def anomalous_correlation(true_mates, mates, setting: np.ndarray) -> tuple[int, float]:
    """Friedel pairs of merged intensities, and how their differences correlate with the true ones.

    Parameters
    ----------
    true_mates, mates
        cctbx arrays of intensities, Friedel mates apart.
    setting : (3, 3) float64
        Rotation of the lattice that brings the indices of `mates` into the setting of the truth.
    """
    from cctbx import miller

    from ssx_mpi.stages.flex_arrays import from_miller_index, to_miller_index

    hkl = from_miller_index(mates.indices()) @ setting.T
    indices = miller.set(true_mates, to_miller_index(np.rint(hkl)), anomalous_flag=True)
    ours = indices.array(data=mates.data(), sigmas=mates.sigmas()).map_to_asu().anomalous_differences()
    ours, theirs = ours.common_sets(true_mates.map_to_asu().anomalous_differences())
    if ours.size() < 3:
        return ours.size(), float("nan")
    return ours.size(), float(np.corrcoef(ours.data().as_numpy_array(), theirs.data().as_numpy_array())[0, 1])


def compare(
    truth: Truth,
    lattices: list[Lattice],
    geometry: Geometry,
    observations: Observations | None = None,
    merged: Path | None = None,
) -> Comparison:
    """Measure a run, given as its lattices, geometry, integrated reflections and merged file, against the truth."""
    matches = match(truth, lattices)
    right = matches.true >= 0
    found = set(matches.true[right].tolist())
    on_image: dict[int, int] = {}
    for lattice, n in zip(truth.lattices, truth.visible_spots):
        on_image[lattice.image] = on_image.get(lattice.image, 0) + n
    hits = {image for image, n in on_image.items() if n >= ENOUGH_SPOTS}
    indexed = {truth.lattices[i].image for i in found}
    strong = {i for i, n in enumerate(truth.visible_spots) if n >= ENOUGH_SPOTS}
    n_merged, cc, cc_scaled, cc_counting = 0, np.nan, np.nan, np.nan
    if observations is not None:
        n_merged, cc, cc_scaled, cc_counting = merging_correlations(truth, observations)
    offset = np.subtract(geometry.beam_centre_mm, truth.geometry.beam_centre_mm)
    farther = geometry.distance_mm - truth.geometry.distance_mm
    panels = None
    if geometry.detector is not None and len(geometry.detector) > 1:
        panels = panel_errors(truth.geometry.detector, geometry.detector)
        offset, farther = np.array(panels.shift_mm[:2]), -panels.shift_mm[2]
    return Comparison(
        hits=len(hits),
        hits_indexed=len(hits & indexed),
        true_lattices=len(strong),
        found_lattices=len(strong & found),
        lattices=len(lattices),
        false_lattices=int(np.sum(~right)),
        duplicate_lattices=int(right.sum()) - len(found),
        orientation_error_deg=float(np.median(matches.error_deg[right])) if right.any() else np.nan,
        beam_centre_error_mm=float(np.linalg.norm(offset)),
        distance_error_mm=farther,
        n_observations=0 if observations is None else len(observations.intensity),
        n_merged=n_merged,
        cc_truth=float(cc),
        cc_truth_scaled=float(cc_scaled),
        cc_counting=float(cc_counting),
        reduced=None if merged is None else compare_merged(truth, merged),
        panels=panels,
    )


def run_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The experiment and reflection files of a run: integrated ones, or indexed ones where there are no others.

    Raises
    ------
    FileNotFoundError
        When the folder holds neither.
    """
    for pattern in ("batch_*/integrated*.expt", "integrated*.expt", "batch_*/indexed*.expt", "indexed*.expt"):
        experiments = sorted(folder.glob(pattern))
        if experiments:
            tables = [path.with_suffix(".refl") for path in experiments]
            return experiments, tables if "integrated" in pattern else []
    raise FileNotFoundError(f"{folder}: no integrated or indexed experiments, neither here nor in batch_*")


def compare_run(truth_folder: Path, run_folder: Path) -> Comparison:
    """Compare the files of a run with the truth beside the simulated images."""
    experiment_files, tables = run_files(run_folder)
    read = [read_experiments(path) for path in experiment_files]
    lattices = [lattice for found, _ in read for lattice in found]
    merged = run_folder / "DataFiles" / "merged.mtz"
    observations = read_observations(tables)
    return compare(load_truth(truth_folder), lattices, read[0][1], observations, merged if merged.is_file() else None)


def table(comparison: Comparison) -> str:
    """The comparison as a few lines for the terminal."""
    c = comparison
    rows = [
        (f"hits with {ENOUGH_SPOTS} visible spots or more", f"{c.hits}"),
        ("of these indexed", f"{c.hits_indexed} ({100 * c.hits_indexed / max(c.hits, 1):.1f}%)"),
        ("true lattices of that strength found", f"{c.found_lattices} of {c.true_lattices}"),
        ("lattices in the run", f"{c.lattices}"),
        ("false lattices", f"{c.false_lattices} ({100 * c.false_lattices / max(c.lattices, 1):.1f}%)"),
        ("found twice", f"{c.duplicate_lattices}"),
        ("median orientation error", f"{c.orientation_error_deg:.4f} degrees"),
        ("error of the beam centre", f"{c.beam_centre_error_mm:.4f} mm"),
        ("error of the distance", f"{c.distance_error_mm:+.4f} mm"),
    ]
    if c.panels is not None:
        rows += table_rows(c.panels)
    if c.reduced is not None:
        r = c.reduced
        rows += [
            ("merged.mtz: reflections, to", f"{r.n_merged}, {r.d_min:.2f} angstrom"),
            ("multiplicity", f"{r.multiplicity:.2f}"),
            ("CC with true intensities", f"{r.cc_truth:.4f}"),
            ("deviations from them over their sigmas", f"{r.deviation:.2f}"),
        ]
        if r.cc_anomalous is not None:
            rows.append(("CC of anomalous differences, on pairs", f"{r.cc_anomalous:.4f}, {r.n_pairs}"))
    elif c.n_observations:
        rows += [
            ("observations, unique reflections", f"{c.n_observations}, {c.n_merged}"),
            ("CC with true intensities", f"{c.cc_truth:.4f}"),
            ("the same, one scale per crystal", f"{c.cc_truth_scaled:.4f}"),
            ("and if counting were the only error", f"{c.cc_counting:.4f}"),
        ]
    return "\n".join(f"  {name:<40s}{value}" for name, value in rows)
