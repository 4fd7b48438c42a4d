"""Parameters of reduction, of both programs, declared with the names that xia2.ssx_reduce has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssx_mpi.parameters import declaration
from ssx_mpi.parameters.declaration import Definition, declared, group, parameter
from ssx_mpi.parameters.user_input import PathReader, check_limits

#: parameters of xia2.ssx_reduce that have no effect here, and why
WITHOUT_MEANING = {
    "reduction_batch_size": "all crystals are reindexed together",
    "batch_size": "all crystals are reindexed together",
    "filtering.remove_filtered_reflections": "scaled files keep what was integrated",
    "input.validate": "all files are looked at",
}


@dataclass(frozen=True)
class CellFilter:
    """Parameters of the filter by unit cells; lengths in angstrom, angles in degrees.

    Parameters
    ----------
    central
        Cell to measure from; None for the median.
    threshold
        Distance in G6 (square angstrom) that links cells into clusters, of which the most populous is kept; None for
        tolerances alone.
    """

    length_tolerance: float | None = parameter(
        "clustering.absolute_length_tolerance",
        "float",
        1.0,
        "Crystals whose cell lengths differ by more (angstrom) from the central cell are left out. None or 0: no "
        "limit.",
        least=0,
        optional=True,
        level=1,
    )
    angle_tolerance: float | None = parameter(
        "clustering.absolute_angle_tolerance",
        "float",
        1.0,
        "As the length tolerance, for the angles (degrees).",
        least=0,
        optional=True,
        level=1,
    )
    central: tuple[float, ...] | None = parameter(
        "clustering.central_unit_cell",
        "cell",
        None,
        "Cell to measure from; by default the median of all crystals.",
        level=1,
    )
    threshold: float | None = parameter(
        "clustering.threshold",
        "float",
        None,
        "Cluster the cells, linking those nearer than this in G6 (square angstrom), and keep the largest cluster.",
        least=0,
        level=1,
    )


@dataclass(frozen=True)
class AmbiguitySettings:
    """Parameters of the search for the setting of each crystal.

    Parameters
    ----------
    starts
        Random starts.
    sample
        Crystals that take part in the starts.
    min_margin
        Log-likelihood by which the best setting must be above the second best; crystals below are left out.
    seed
        Of the random starts.
    """

    starts: int = parameter(
        "ambiguity.starts", "int", 5, "Random starts; how far they agree is reported.", least=1, level=2
    )
    sample: int = parameter(
        "ambiguity.sample", "int", 2000, "Crystals that take part in the random starts.", least=10, level=2
    )
    min_margin: float = parameter(
        "ambiguity.min_margin",
        "float",
        3.0,
        "Log-likelihood by which a crystal's best setting must be above the second best; others are left out.",
        least=0,
        level=2,
    )
    seed: int = parameter(
        "ambiguity.seed",
        "int",
        42,
        "Of the random starts: the same seed gives the same result, on any number of ranks.",
        level=3,
    )


@dataclass(frozen=True)
class ScalingSettings:
    """Parameters of scaling: how far to iterate, and on what.

    Parameters
    ----------
    robust_bound
        Normalised deviation beyond which an observation loses weight.
    tolerance
        Root mean square relative change of the scales in a round, at which they are converged.
    max_rounds
        Rounds at most.
    error_cycles
        Estimates of the error model before the scales are brought to convergence.
    min_observations
        Crystals with fewer usable observations are left out.
    widths
        Whether to refine the widths of the reflections, which correct the partialities.
    orientations
        Whether to refine the orientations of the crystals.
    """

    robust_bound: float = parameter(
        "scaling.robust_bound",
        "float",
        4.0,
        "Normalised deviation beyond which an observation loses weight. 0: none does.",
        least=0,
        level=2,
    )
    tolerance: float = 1e-3
    max_rounds: int = 200
    error_cycles: int = 4
    min_observations: int = parameter(
        "scaling.min_observations",
        "int",
        10,
        "Crystals with fewer usable reflections are left out.",
        least=2,
        level=1,
    )
    widths: bool = parameter(
        "scaling.refine_partiality",
        "bool",
        True,
        "Refine the widths of reflections, with resolution and for each crystal, where partialities tell of them.",
        level=1,
    )
    orientations: bool = parameter(
        "scaling.refine_orientation",
        "bool",
        True,
        "Rotate crystals to where their intensities say that they are, where observations left out of it agree.",
        level=1,
    )


@dataclass(frozen=True)
class MergingSettings:
    """Parameters of merging.

    Parameters
    ----------
    n_shells
        Resolution shells of the tables.
    repeats
        Random splits into half-sets.
    cc_half_cutoff
        CC1/2 at which the resolution is cut; None keeps all.
    robust_bound
        Normalised deviation beyond which an observation loses weight.
    bootstrap
        Data sets of resampled crystals to merge besides.
    """

    n_shells: int = parameter("merging.n_bins", "int", 20, "Resolution shells.", least=1, level=1)
    repeats: int = parameter(
        "merging.repeats",
        "int",
        10,
        "Random splits into half-sets, over which CC1/2 and Rsplit are averaged.",
        least=1,
        level=2,
    )
    cc_half_cutoff: float | None = parameter(
        "merging.cc_half_cutoff",
        "float",
        0.3,
        "CC1/2 at which merged.mtz is cut. None: no cut.",
        least=0.01,
        most=0.99,
        optional=True,
        level=1,
    )
    robust_bound: float = declared(uses=("scaling.robust_bound",), make=lambda bound, path: bound, default=4.0)
    bootstrap: int = parameter(
        "merging.bootstrap",
        "int",
        0,
        "Data sets to merge besides, each of as many crystals drawn from those merged with replacement, for the errors "
        "of maps and models: merged_bootstrap_001.mtz and so on. Scales stay those of all crystals.",
        least=0,
        level=1,
    )


@dataclass(frozen=True)
class CrystalFilter:
    """Filters of scaled crystals: whether each is on, and its limits."""

    delta_cc_half: bool = declared(
        Definition(
            "filtering.method",
            "choices",
            ("None",),
            "Leave out crystals that lower CC1/2, or whose mean I/sigma is low.",
            choices=("None", "deltacchalf", "Isigma"),
            level=1,
        ),
        make=lambda methods, path: "deltacchalf" in methods,
        default=False,
    )
    std_cutoff: float = parameter(
        "filtering.deltacchalf.stdcutoff",
        "float",
        4.0,
        "Standard deviations (by medians) below the median delta-CC1/2 at which a crystal that does not fit goes.",
        least=0,
        level=1,
        aliases=("filtering.stdcutoff",),
    )
    max_cycles: int = parameter(
        "filtering.deltacchalf.max_cycles",
        "int",
        50,
        "Times at most that the worst crystals are left out and the others scaled again; it ends when none is found.",
        least=1,
        level=2,
    )
    max_percent_removed: float = parameter(
        "filtering.deltacchalf.max_percent_removed",
        "float",
        50.0,
        "Largest share of the crystals to leave out in all, in percent.",
        least=0,
        most=100,
        level=2,
    )
    i_over_sigma: bool = declared(
        uses=("filtering.method",), make=lambda methods, path: "Isigma" in methods, default=False
    )
    min_i_over_sigma: float = parameter(
        "filtering.Isigma.min_i_over_sigma",
        "float",
        1.0,
        "Least mean I/sigma of a crystal.",
        level=1,
        aliases=("filtering.mean_i_over_sigma_threshold",),
    )


@dataclass(frozen=True)
class Exports:
    """What to write besides merged intensities."""

    scaled: bool = parameter(
        "export.scaled", "bool", True, "scaled_N.expt and scaled_N.refl for each input file.", level=1
    )
    stream: bool = parameter(
        "export.stream",
        "bool",
        False,
        "A CrystFEL stream of the integrated crystals, in their common setting, for partialator.",
        level=1,
    )
    mmcif: bool = parameter(
        "export.mmcif", "bool", False, "The merged data as mmCIF, for deposition, beside each merged.mtz.", level=1
    )
    unmerged_mtz: bool = parameter(
        "export.unmerged_mtz", "bool", False, "Scaled, unmerged intensities as MTZ, by DIALS on rank 0.", level=1
    )
    unmerged_mmcif: bool = parameter(
        "export.unmerged_mmcif", "bool", False, "Scaled, unmerged intensities as mmCIF, by DIALS on rank 0.", level=1
    )


@dataclass(frozen=True)
class ReductionParameters:
    """All parameters of a reduction."""

    steps: tuple[str, ...] = parameter(
        "steps",
        "choices",
        ("scale", "merge"),
        "merge alone takes files that were scaled before; scale alone leaves scaled files.",
        choices=("scale", "merge"),
        aliases=("workflow.steps",),
    )
    #: whether a warning is a failure; the results are the same
    strict: bool = parameter(
        "strict",
        "bool",
        False,
        "End with exit code 3 when the reduction warns of something; what it wrote stays.",
        affects_results=False,
    )
    engine: str = parameter(
        "engine",
        "choice",
        "fast",
        "fast: over all ranks, at linear cost. dials: dials.scale and dials.merge in one process on rank 0.",
        choices=("fast", "dials"),
    )
    d_min: float | None = parameter(
        "d_min",
        "float",
        None,
        "High-resolution limit in angstrom. By default estimated from CC1/2 for merged.mtz; merged_full.mtz has all.",
        least=0.1,
    )
    d_max: float | None = parameter("d_max", "float", None, "Low-resolution limit in angstrom.", least=0.1)
    anomalous: bool = parameter(
        "anomalous",
        "bool",
        False,
        "Keep Friedel mates apart in amplitudes and statistics.",
        aliases=("scaling.anomalous",),
    )
    space_group: str | None = parameter(
        "space_group",
        "space_group",
        None,
        "Space group to reduce in; by default that of the crystals. It must have their centring, and allow their cell.",
        aliases=("symmetry.space_group",),
    )
    partiality_threshold: float = parameter(
        "partiality_threshold",
        "float",
        0.25,
        "Reflections recorded to less than this fraction are left out.",
        least=0,
        most=1,
        level=1,
    )
    reference: Path | None = parameter(
        "reference",
        "file",
        None,
        "Intensities (.mtz, .cif) or a model (.pdb, .cif) that settles the indexing ambiguity; CC to it is reported.",
        aliases=("scaling.model",),
    )
    free_flags: str = parameter(
        "free_flags",
        "choice",
        "copy",
        "copy: those of the reference, if any. new: 5% in thin shells, alike for what the lattice has alike, 0 free.",
        choices=("copy", "new", "none"),
    )
    k_sol: float = parameter(
        "reference_model.k_sol",
        "float",
        0.35,
        "Density of the bulk solvent, electrons per cubic angstrom, for intensities computed from a model.",
        level=2,
    )
    b_sol: float = parameter(
        "reference_model.b_sol", "float", 46.0, "B factor of the bulk solvent in square angstrom.", level=2
    )
    cells: CellFilter = group(CellFilter)
    lattice_symmetry_max_delta: float = parameter(
        "symmetry.lattice_symmetry_max_delta",
        "float",
        0.5,
        "Degrees by which a lattice may miss a symmetry that makes indexing ambiguous.",
        least=0,
        level=1,
    )
    ambiguity: AmbiguitySettings = group(AmbiguitySettings)
    check_with_cosym: bool = parameter(
        "ambiguity.check_with_cosym",
        "bool",
        False,
        "Compare the outcome with dials.cosym, on up to 500 crystals, on rank 0.",
        level=2,
    )
    filtering: CrystalFilter = group(CrystalFilter)
    scaling: ScalingSettings = group(ScalingSettings)
    merging: MergingSettings = group(MergingSettings)
    symmetry_phil: Path | None = parameter(
        "symmetry.phil", "file", None, "A file with parameters of dials.cosym, for check_with_cosym.", level=2
    )
    scaling_phil: Path | None = parameter(
        "scaling.phil",
        "file",
        None,
        "A file with parameters of dials.scale. Those that engine=fast has are taken over; others make DIALS scale.",
        level=2,
    )
    merging_phil: Path | None = parameter(
        "merging.phil", "file", None, "A file with parameters of dials.merge, as scaling.phil.", level=2
    )
    dose_series_repeat: int | None = parameter(
        "dose_series_repeat",
        "int",
        None,
        "Images at each position of a dose series: image n belongs to dose point (n - 1) mod this + 1, merged apart.",
        least=2,
        level=1,
    )
    grouping: Path | None = parameter(
        "grouping",
        "file",
        None,
        "A grouping.yml that assigns images to groups by metadata arrays in HDF5 files, merged apart.",
        level=1,
    )
    append: Path | None = parameter(
        "append",
        "folder",
        None,
        "Output folder of an earlier reduction: its crystals' scales and settings are the start for this one.",
        level=1,
    )
    export: Exports = group(Exports)


def read(extract: Any, path: PathReader, scope: str = "", d_max: float | None = None) -> ReductionParameters:
    """The dataclass for what PHIL extracted.

    Parameters
    ----------
    extract
        ``scope_extract`` with all definitions of :class:`ReductionParameters`.
    path
        Makes absolute paths.
    scope
        What stands before their names, with its point, where they are within another scope.
    d_max
        Low-resolution limit in angstrom where the user gave none for the reduction.

    Raises
    ------
    InputError
        For a file that is not there, limits at odds with each other, or a cell that is none.
    """
    found = declaration.read(ReductionParameters, extract, path, scope)
    if found.d_max is None:
        found = replace(found, d_max=d_max)
    check_limits(found.d_min, found.d_max, scope)
    return found
