"""Parameters of reduction, of both programs: the PHIL scope with the names that xia2.ssx_reduce has, and what it
becomes once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ssx_mpi.parameters.user_input import PathReader, check_limits, read_cell

REDUCTION_PHIL = """
steps = *scale *merge
  .type = choice(multi=True)
  .help = "merge alone takes files that were scaled before; scale alone leaves scaled files."
strict = False
  .type = bool
  .help = "End with exit code 3 when the reduction warns of something; what it wrote stays."
engine = *fast dials
  .type = choice
  .help = "fast: over all ranks, at linear cost. dials: dials.scale and dials.merge in one process on rank 0."
d_min = None
  .type = float(value_min=0.1)
  .help = "High-resolution limit in angstrom. By default estimated from CC1/2 for merged.mtz; merged_full.mtz has all."
d_max = None
  .type = float(value_min=0.1)
  .help = "Low-resolution limit in angstrom."
anomalous = False
  .type = bool
  .help = "Keep Friedel mates apart in amplitudes and statistics."
partiality_threshold = 0.25
  .type = float(value_min=0, value_max=1)
  .help = "Reflections recorded to less than this fraction are left out."
reference = None
  .type = path
  .help = "Intensities (.mtz, .cif) or a model (.pdb, .cif) that settles the indexing ambiguity; CC to it is reported."
free_flags = *copy new none
  .type = choice
  .help = "copy: those of the reference, if any. new: 5% in thin shells, alike for what the lattice has alike, 0 free."
reference_model {
  k_sol = 0.35
    .type = float
    .help = "Density of the bulk solvent, electrons per cubic angstrom, for intensities computed from a model."
  b_sol = 46.0
    .type = float
    .help = "B factor of the bulk solvent in square angstrom."
}
clustering {
  absolute_length_tolerance = 1.0
    .type = float(value_min=0)
    .optional = True
    .help = "Crystals whose cell lengths differ by more (angstrom) from the central cell are left out. None: no limit."
  absolute_angle_tolerance = 1.0
    .type = float(value_min=0)
    .optional = True
    .help = "As the length tolerance, for the angles (degrees)."
  central_unit_cell = None
    .type = floats(size=6)
    .help = "Cell to measure from; by default the median of all crystals."
  threshold = None
    .type = float(value_min=0)
    .help = "Cluster the cells, linking those nearer than this in G6 (square angstrom), and keep the largest cluster."
}
symmetry {
  lattice_symmetry_max_delta = 0.5
    .type = float(value_min=0)
    .help = "Degrees by which a lattice may miss a symmetry that makes indexing ambiguous."
  phil = None
    .type = path
    .help = "A file with parameters of dials.cosym, for check_with_cosym."
}
ambiguity {
  starts = 5
    .type = int(value_min=1)
    .help = "Random starts; how far they agree is reported."
  sample = 2000
    .type = int(value_min=10)
    .help = "Crystals that take part in the random starts."
  min_margin = 3.0
    .type = float(value_min=0)
    .help = "Log-likelihood by which a crystal's best setting must be above the second best; others are left out."
  seed = 42
    .type = int
    .help = "Of the random starts: the same seed gives the same result, on any number of ranks."
  check_with_cosym = False
    .type = bool
    .help = "Compare the outcome with dials.cosym, on up to 500 crystals, on rank 0."
}
filtering {
  method = *None deltacchalf Isigma
    .type = choice(multi=True)
    .help = "Leave out crystals that lower CC1/2, or whose mean I/sigma is low."
  deltacchalf {
    stdcutoff = 4.0
      .type = float(value_min=0)
      .help = "Standard deviations below the mean delta-CC1/2 at which a crystal is left out."
    max_cycles = 6
      .type = int(value_min=1)
      .help = "Times that the worst crystals are left out and the others scaled again."
    max_percent_removed = 10.0
      .type = float(value_min=0, value_max=100)
      .help = "Largest share of the crystals to leave out in all, in percent."
  }
  Isigma {
    min_i_over_sigma = 1.0
      .type = float
      .help = "Least mean I/sigma of a crystal."
  }
}
scaling {
  min_observations = 10
    .type = int(value_min=2)
    .help = "Crystals with fewer usable reflections are left out."
  robust_bound = 4.0
    .type = float(value_min=0)
    .help = "Normalised deviation beyond which an observation loses weight. 0: none does."
  refine_partiality = True
    .type = bool
    .help = "Refine the widths of reflections, with resolution and for each crystal, where partialities tell of them."
  refine_orientation = True
    .type = bool
    .help = "Rotate crystals to where their intensities say that they are, where observations left out of it agree."
  phil = None
    .type = path
    .help = "A file with parameters of dials.scale. Those that engine=fast has are taken over; others make DIALS scale."
}
merging {
  n_bins = 20
    .type = int(value_min=1)
    .help = "Resolution shells."
  repeats = 10
    .type = int(value_min=1)
    .help = "Random splits into half-sets, over which CC1/2 and Rsplit are averaged."
  cc_half_cutoff = 0.3
    .type = float(value_min=0.01, value_max=0.99)
    .optional = True
    .help = "CC1/2 at which merged.mtz is cut. None: no cut."
  phil = None
    .type = path
    .help = "A file with parameters of dials.merge, as scaling.phil."
}
dose_series_repeat = None
  .type = int(value_min=2)
  .help = "Images at each position of a dose series: image n belongs to dose point (n - 1) mod this + 1, merged apart."
grouping = None
  .type = path
  .help = "A grouping.yml that assigns images to groups by metadata arrays in HDF5 files, merged apart."
append = None
  .type = path
  .help = "Output folder of an earlier reduction: its crystals' scales and settings are the start for this one."
export {
  stream = False
    .type = bool
    .help = "A CrystFEL stream of the integrated crystals, in their common setting, for partialator."
  unmerged_mtz = False
    .type = bool
    .help = "Scaled, unmerged intensities as MTZ, by DIALS on rank 0."
  unmerged_mmcif = False
    .type = bool
    .help = "Scaled, unmerged intensities as mmCIF, by DIALS on rank 0."
  scaled = True
    .type = bool
    .help = "scaled_N.expt and scaled_N.refl for each input file."
}
"""


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

    length_tolerance: float | None = 1.0
    angle_tolerance: float | None = 1.0
    central: tuple[float, ...] | None = None
    threshold: float | None = None


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

    starts: int = 5
    sample: int = 2000
    min_margin: float = 3.0
    seed: int = 42


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

    robust_bound: float = 4.0
    tolerance: float = 1e-3
    max_rounds: int = 200
    error_cycles: int = 4
    min_observations: int = 10
    widths: bool = True
    orientations: bool = True


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
    """

    n_shells: int = 20
    repeats: int = 10
    cc_half_cutoff: float | None = 0.3
    robust_bound: float = 4.0


@dataclass(frozen=True)
class CrystalFilter:
    """Filters of scaled crystals; see the PHIL scope."""

    delta_cc_half: bool = False
    std_cutoff: float = 4.0
    max_cycles: int = 6
    max_percent_removed: float = 10.0
    i_over_sigma: bool = False
    min_i_over_sigma: float = 1.0


@dataclass(frozen=True)
class Exports:
    """What to write besides merged intensities."""

    scaled: bool = True
    stream: bool = False
    unmerged_mtz: bool = False
    unmerged_mmcif: bool = False


@dataclass(frozen=True)
class ReductionParameters:
    """All parameters of a reduction; the fields bear the names of the PHIL scope, where their help is."""

    steps: tuple[str, ...] = ("scale", "merge")
    #: whether a warning is a failure; the results are the same
    strict: bool = field(default=False, metadata={"affects_results": False})
    engine: str = "fast"
    d_min: float | None = None
    d_max: float | None = None
    anomalous: bool = False
    partiality_threshold: float = 0.25
    reference: Path | None = None
    free_flags: str = "copy"
    k_sol: float = 0.35
    b_sol: float = 46.0
    cells: CellFilter = field(default_factory=CellFilter)
    lattice_symmetry_max_delta: float = 0.5
    ambiguity: AmbiguitySettings = field(default_factory=AmbiguitySettings)
    check_with_cosym: bool = False
    filtering: CrystalFilter = field(default_factory=CrystalFilter)
    scaling: ScalingSettings = field(default_factory=ScalingSettings)
    merging: MergingSettings = field(default_factory=MergingSettings)
    symmetry_phil: Path | None = None
    scaling_phil: Path | None = None
    merging_phil: Path | None = None
    dose_series_repeat: int | None = None
    grouping: Path | None = None
    append: Path | None = None
    export: Exports = field(default_factory=Exports)


def from_phil(params, path: PathReader, prefix: str = "", d_max: float | None = None) -> ReductionParameters:
    """The dataclass for the extract of a PHIL scope that includes :data:`REDUCTION_PHIL`.

    Parameters
    ----------
    path
        Makes absolute paths.
    prefix
        What stands before the names of the parameters where the scope is within another one.
    d_max
        Low-resolution limit in angstrom where the scope gives none.

    Raises
    ------
    InputError
        For a file that is not there, limits at odds with each other, or a cell that is none.
    """
    d_max = d_max if params.d_max is None else params.d_max
    check_limits(params.d_min, d_max, prefix)

    def existing(name: str | None, parameter: str) -> Path | None:
        return path.existing(name, prefix + parameter)

    methods = [str(method) for method in params.filtering.method]
    clustering = params.clustering
    return ReductionParameters(
        strict=params.strict,
        steps=tuple(params.steps),
        engine=params.engine,
        d_min=params.d_min,
        d_max=d_max,
        anomalous=params.anomalous,
        partiality_threshold=params.partiality_threshold,
        reference=existing(params.reference, "reference"),
        free_flags=params.free_flags,
        k_sol=params.reference_model.k_sol,
        b_sol=params.reference_model.b_sol,
        cells=CellFilter(
            length_tolerance=clustering.absolute_length_tolerance,
            angle_tolerance=clustering.absolute_angle_tolerance,
            central=read_cell(clustering.central_unit_cell, f"{prefix}clustering.central_unit_cell"),
            threshold=clustering.threshold,
        ),
        lattice_symmetry_max_delta=params.symmetry.lattice_symmetry_max_delta,
        ambiguity=AmbiguitySettings(
            starts=params.ambiguity.starts,
            sample=params.ambiguity.sample,
            min_margin=params.ambiguity.min_margin,
            seed=params.ambiguity.seed,
        ),
        check_with_cosym=params.ambiguity.check_with_cosym,
        filtering=CrystalFilter(
            delta_cc_half="deltacchalf" in methods,
            std_cutoff=params.filtering.deltacchalf.stdcutoff,
            max_cycles=params.filtering.deltacchalf.max_cycles,
            max_percent_removed=params.filtering.deltacchalf.max_percent_removed,
            i_over_sigma="Isigma" in methods,
            min_i_over_sigma=params.filtering.Isigma.min_i_over_sigma,
        ),
        scaling=ScalingSettings(
            robust_bound=params.scaling.robust_bound,
            min_observations=params.scaling.min_observations,
            widths=params.scaling.refine_partiality,
            orientations=params.scaling.refine_orientation,
        ),
        merging=MergingSettings(
            n_shells=params.merging.n_bins,
            repeats=params.merging.repeats,
            cc_half_cutoff=params.merging.cc_half_cutoff,
            robust_bound=params.scaling.robust_bound,
        ),
        symmetry_phil=existing(params.symmetry.phil, "symmetry.phil"),
        scaling_phil=existing(params.scaling.phil, "scaling.phil"),
        merging_phil=existing(params.merging.phil, "merging.phil"),
        dose_series_repeat=params.dose_series_repeat,
        grouping=existing(params.grouping, "grouping"),
        append=None if params.append is None else path.absolute(params.append),
        export=Exports(
            scaled=params.export.scaled,
            stream=params.export.stream,
            unmerged_mtz=params.export.unmerged_mtz,
            unmerged_mmcif=params.export.unmerged_mmcif,
        ),
    )
