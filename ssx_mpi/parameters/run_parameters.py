"""The parameters of ``ssx_mpi``: the PHIL scope that users see, and the frozen dataclasses that it becomes once.

The names are those that xia2's SSX pipeline has taught its users. Everything after :func:`read` works with
:class:`Parameters`; no other module reads PHIL of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssx_mpi.parameters import reduction_parameters
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.parameters.user_input import InputError, PathReader, check_limits, check_values, identity, read_cell

#: steps that are done with each image, in their order
STEPS = ("find_spots", "index", "integrate")
#: the step that is done with all crystals together, after those
REDUCE = "reduce"

#: ellipsoid models by the names of the newest DIALS
RLP_MOSAICITY = ("simple1", "simple6", "simple1angular1", "simple1angular3", "simple6angular1")

PHIL = f"""
image = None
  .type = str
  .multiple = True
  .help = "Image file, HDF5/NeXus or CBF; may be given more than once. image=file.h5:1001:2000 selects an inclusive"
          "range of images, counted from one."
template = None
  .type = str
  .multiple = True
  .help = "Image sequence template such as lyso_1_###.cbf; may be given more than once. template:1:500 selects an"
          "inclusive range of the numbers in the names."
directory = None
  .type = str
  .multiple = True
  .help = "Folder of images: all of its .cbf files or, where there are none, its master, .nxs or .h5 files."
space_group = None
  .type = space_group
  .help = "Space group of the crystals. Without it and unit_cell the program assesses the crystals and stops."
unit_cell = None
  .type = floats(size=6)
  .help = "Unit cell of the crystals in angstrom and degrees: a,b,c,alpha,beta,gamma."
reference_geometry = None
  .type = path
  .help = "Experiment list with a refined detector and beam, to use as they are; no geometry refinement is done."
starting_geometry = None
  .type = path
  .help = "Experiment list whose detector and beam replace those of the image headers before geometry refinement."
mask = None
  .type = path
  .help = "DIALS mask file; its masked pixels are used neither for spots nor for integration."
d_min = None
  .type = float(value_min=0)
  .help = "High-resolution limit in angstrom, for spot finding and integration, and so for what is there to be reduced."
          "Where merged.mtz ends within it is estimated, unless reduction.d_min is given."
d_max = None
  .type = float(value_min=0)
  .help = "Low-resolution limit in angstrom, for spot finding and, unless reduction.d_max is given, reduction."
max_lattices = 3
  .type = int(value_min=1)
  .help = "Most lattices to index on one image."
min_spots = 10
  .type = int(value_min=1)
  .help = "Images with fewer strong spots are not hits and are not indexed."
batch_size = 1000
  .type = int(value_min=1)
  .help = "Number of images whose results are written and reported together."
nproc = Auto
  .type = int(value_min=1)
  .help = "MPI ranks to start when not under mpirun or srun already; Auto is the cores this process may use."
steps = *find_spots *index *integrate *reduce
  .type = choice(multi=True)
  .optional = True
  .help = "Steps to run after geometry refinement; each also alone, from the files of the one before. None refines the"
          "geometry only. Reduction (reduction.*) merges the integrated crystals of all batches."
engine = *fast dials
  .type = choice
  .help = "fast: our own kernels, for the same answers in a fraction of the time; what they do not cover is left to"
          "DIALS, and the log says so. dials: the algorithms of DIALS as they are. Reduction has reduction.engine."
live_merge = False
  .type = bool
  .help = "Show completeness, multiplicity and CC1/2 of all crystals so far, as each batch finishes."
keep_intermediate = True
  .type = bool
  .help = "Write strong spots and indexed crystals too, not only the integrated ones."
restart = False
  .type = bool
  .help = "Begin anew in an output folder that holds a run, removing what that run wrote."
time_limit = Auto
  .type = str
  .help = "Time that this run may take, as Slurm writes it (minutes, or hours:minutes:seconds). It stops in order"
          "shortly before and the same command goes on. Auto is what is left of the Slurm job that it runs in."
image_timeout = 300
  .type = float(value_min=1)
  .help = "An image that takes longer than this many seconds is abandoned and counted as a failure."
max_failures = 0.98
  .type = float(value_min=0, value_max=1)
  .help = "Stop early when more than this share of the images fails in one way: cannot be read, of all; not indexed,"
          "of the hits; not integrated, of those indexed. 1 never stops."
output {{
  directory = .
    .type = path
    .help = "Folder for everything that the run writes."
}}
dials_import.phil = None
  .type = path
  .help = "DIALS parameters for importing images (the format and geometry scopes of dials.import)."
  .expert_level = 1
spotfinding {{
  min_spot_size = 3
    .type = int(value_min=1)
    .help = "Fewest pixels of a strong spot."
  max_spot_size = 20
    .type = int(value_min=1)
    .help = "Most pixels of a strong spot."
  phil = None
    .type = path
    .help = "DIALS parameters for dials.find_spots."
    .expert_level = 1
}}
indexing.phil = None
  .type = path
  .help = "DIALS parameters for dials.ssx_index."
  .expert_level = 1
geometry_refinement {{
  n_crystals = 250
    .type = str
    .help = "Number of crystals, from the first image on, for the joint refinement of the detector; all takes those of"
            "all images."
  images_to_use = None
    .type = str
    .help = "Use just these images for it, as first:last, counted from one over all the images."
  restrain_cell = False
    .type = bool
    .help = "Hold the cells to unit_cell while the detector is refined, for few crystals."
  hierarchy_level = Auto
    .type = int(value_min=0)
    .help = "Refine the parts of the detector down to this level of its tree of panels: 0 for the whole alone, 1 for"
            "the parts of the whole, and so on. By default the level that brings crystals that were left out closest"
            "to their spots."
  panel_shift = Auto
    .type = float(value_min=0.001)
    .help = "How far parts are expected from where the header has them, along each axis, in mm: a part with few spots"
            "is held to its neighbours accordingly. By default the data tell."
    .expert_level = 1
  panel_tilt = Auto
    .type = float(value_min=0.001)
    .help = "The same for turns about each axis, in degrees."
    .expert_level = 1
  final = False
    .type = bool
    .help = "When all batches are done, refine once more with all indexed crystals of the run, and say whether"
            "integrating again with that geometry (geometry_refinement/final.expt) would gain."
  beam_search = True
    .type = bool
    .help = "Look for the beam centre in the spots of the first hits before anything is indexed."
    .expert_level = 1
  phil = None
    .type = path
    .help = "DIALS parameters for dials.refine."
    .expert_level = 1
}}
assess_crystals {{
  n_crystals = 250
    .type = int(value_min=1)
    .help = "Number of crystals to assess where unit cell or space group is unknown."
  images_to_use = None
    .type = str
    .help = "Use just these images for it, as first:last, counted from one over all the images."
}}
integration {{
  algorithm = *ellipsoid stills
    .type = choice
    .help = "Profile model: ellipsoids refined for each crystal, or the older stills model."
  ellipsoid.rlp_mosaicity = {" ".join("*" + m if m == "simple6" else m for m in RLP_MOSAICITY)}
    .type = choice
    .help = "Shape of the reciprocal lattice points, by its name in the newest DIALS."
  phil = None
    .type = path
    .help = "DIALS parameters for dials.ssx_integrate."
    .expert_level = 1
}}
"""


@dataclass(frozen=True)
class Source:
    """One input as the user named it, with the inclusive range chosen from it (counted from one), if any."""

    kind: str
    name: str
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True)
class PanelPriors:
    """Widths of the normal distributions of the motion of a part of the detector against the part above it.

    Attributes
    ----------
    shift : float or None
        Along each axis, mm; None where the data tell.
    tilt : float or None
        About each axis, degrees; None where the data tell.
    """

    shift: float | None = None
    tilt: float | None = None


#: more crystals than any run has: all
ALL_CRYSTALS = 2**40


@dataclass(frozen=True)
class CrystalSelection:
    """How many crystals a stage wants, and from which images (inclusive, counted from one over all images)."""

    n_crystals: int
    first: int | None
    last: int | None

    @property
    def wanted(self) -> str:
        """How many, as the parameter has it."""
        return "all" if self.n_crystals == ALL_CRYSTALS else str(self.n_crystals)


@dataclass(frozen=True)
class Spotfinding:
    min_spot_size: int
    max_spot_size: int
    phil: Path | None


@dataclass(frozen=True)
class Integration:
    algorithm: str
    rlp_mosaicity: str
    phil: Path | None


@dataclass(frozen=True)
class Parameters:
    """Everything that one run was asked for; paths are absolute.

    ``unit_cell`` holds a, b, c in angstrom and alpha, beta, gamma in degrees, ``space_group`` the Hermann-Mauguin
    symbol with its setting, resolutions are in angstrom. ``nproc`` is None for as many as there are cores,
    ``time_limit`` (seconds) None for that of the Slurm job, if any; ``image_timeout`` is in seconds.
    """

    sources: tuple[Source, ...]
    space_group: str | None
    unit_cell: tuple[float, ...] | None
    reference_geometry: Path | None
    starting_geometry: Path | None
    mask: Path | None
    d_min: float | None
    d_max: float | None
    max_lattices: int
    min_spots: int
    batch_size: int
    nproc: int | None = field(metadata={"affects_results": False})
    steps: tuple[str, ...] = field(metadata={"affects_results": False})
    engine: str
    keep_intermediate: bool
    restart: bool = field(metadata={"affects_results": False})
    time_limit: float | None = field(metadata={"affects_results": False})
    image_timeout: float = field(metadata={"affects_results": False})
    max_failures: float = field(metadata={"affects_results": False})
    directory: Path = field(metadata={"affects_results": False})
    import_phil: Path | None
    spotfinding: Spotfinding
    indexing_phil: Path | None
    geometry: CrystalSelection
    restrain_cell: bool
    final_geometry: bool = field(metadata={"affects_results": False})
    hierarchy_level: int | None
    panel_priors: PanelPriors
    beam_search: bool
    refinement_phil: Path | None
    assess: CrystalSelection
    integration: Integration
    live_merge: bool = field(metadata={"affects_results": False})
    #: what the crystals are is settled before; the reduction has an identity of its own
    reduction: ReductionParameters = field(metadata={"affects_results": False})
    #: the assignments that make it what it is, for a command line
    reduction_given: tuple[str, ...] = field(metadata={"affects_results": False})
    #: full names of the parameters that were given: these win over a file for DIALS, our defaults do not
    typed: tuple[str, ...] = ()

    @property
    def symmetry_known(self) -> bool:
        return self.space_group is not None and self.unit_cell is not None

    @property
    def image_steps(self) -> tuple[str, ...]:
        """The steps to do with each image."""
        return tuple(s for s in self.steps if s in STEPS)

    def identity(self) -> dict[str, str]:
        """What the results depend on, by name, for telling whether a folder holds the same run.

        A file counts by its contents too, so that editing it is noticed.
        """
        found = identity(self)
        if not any((self.spotfinding.phil, self.indexing_phil, self.integration.phil)):
            # who gave a value matters beside files for DIALS alone
            del found["typed"]
        return found


def scope():
    """The PHIL scope object of ``ssx_mpi``."""
    import iotbx.phil

    return iotbx.phil.parse(f"{PHIL}\nreduction {{\n{reduction_parameters.REDUCTION_PHIL}\n}}\n")


def read(extract, cwd: Path, typed: Iterable[str] = ()) -> Parameters:
    """The dataclasses for an extracted PHIL scope.

    Parameters
    ----------
    extract
        ``scope_extract`` of :func:`scope`.
    cwd
        Absolute folder that relative paths are relative to.
    typed
        Full names of the parameters that the user gave.

    Raises
    ------
    InputError
        For a file that is not there, a malformed range, limits at odds with each other, or a cell that is none or that
        the space group forbids.
    """
    check_values(extract, scope())
    check_limits(extract.d_min, extract.d_max)
    smallest, largest = extract.spotfinding.min_spot_size, extract.spotfinding.max_spot_size
    if smallest > largest:
        raise InputError(f"spotfinding.min_spot_size={smallest} is above spotfinding.max_spot_size={largest}")
    space_group, unit_cell = _symmetry(extract)
    path = PathReader(cwd)
    return Parameters(
        sources=_sources(extract, path),
        space_group=space_group,
        unit_cell=unit_cell,
        reference_geometry=path.existing(extract.reference_geometry, "reference_geometry"),
        starting_geometry=path.existing(extract.starting_geometry, "starting_geometry"),
        mask=path.existing(extract.mask, "mask"),
        d_min=extract.d_min,
        d_max=extract.d_max,
        max_lattices=extract.max_lattices,
        min_spots=extract.min_spots,
        batch_size=extract.batch_size,
        nproc=extract.nproc if isinstance(extract.nproc, int) else None,
        steps=_steps(extract.steps or []),
        engine=extract.engine,
        keep_intermediate=extract.keep_intermediate,
        restart=extract.restart,
        time_limit=read_duration(extract.time_limit),
        image_timeout=extract.image_timeout,
        max_failures=extract.max_failures,
        directory=path.absolute(extract.output.directory),
        import_phil=path.existing(extract.dials_import.phil, "dials_import.phil"),
        spotfinding=Spotfinding(
            extract.spotfinding.min_spot_size,
            extract.spotfinding.max_spot_size,
            path.existing(extract.spotfinding.phil, "spotfinding.phil"),
        ),
        indexing_phil=path.existing(extract.indexing.phil, "indexing.phil"),
        geometry=_selection(extract.geometry_refinement, "geometry_refinement"),
        restrain_cell=extract.geometry_refinement.restrain_cell,
        final_geometry=extract.geometry_refinement.final,
        hierarchy_level=_unless_auto(extract.geometry_refinement.hierarchy_level),
        panel_priors=PanelPriors(
            _unless_auto(extract.geometry_refinement.panel_shift), _unless_auto(extract.geometry_refinement.panel_tilt)
        ),
        beam_search=extract.geometry_refinement.beam_search,
        refinement_phil=path.existing(extract.geometry_refinement.phil, "geometry_refinement.phil"),
        assess=_selection(extract.assess_crystals, "assess_crystals"),
        integration=Integration(
            extract.integration.algorithm,
            extract.integration.ellipsoid.rlp_mosaicity,
            path.existing(extract.integration.phil, "integration.phil"),
        ),
        live_merge=extract.live_merge,
        reduction=reduction_parameters.from_phil(extract.reduction, path, "reduction.", d_max=extract.d_max),
        reduction_given=tuple(_reduction_given(extract, path)),
        typed=tuple(sorted(typed)),
    )


def _unless_auto(value: Any) -> Any:
    return None if value is None or str(value) == "Auto" else value


def _reduction_given(extract, path: PathReader) -> Iterator[str]:
    """What differs from the defaults in the scope of the reduction, as on a command line, with absolute paths."""
    master = scope()
    for found in master.fetch_diff(source=master.format(python_object=extract)).all_definitions():
        if not found.path.startswith("reduction."):
            continue
        value = " ".join(word.value for word in found.object.words)
        is_path = found.object.type is not None and found.object.type.phil_type == "path"
        yield f"{found.path}={path.absolute(value) if is_path else value}"


def _steps(given: list[str]) -> tuple[str, ...]:
    steps = tuple(s for s in (*STEPS, REDUCE) if s in given)
    if REDUCE in steps and steps != (REDUCE,) and "integrate" not in steps:
        raise InputError(f"steps={'+'.join(steps)}: reduce takes what integrate leaves: add it, or do reduce alone")
    return steps


def read_duration(text: Any) -> float | None:
    """Seconds of a time as Slurm writes it: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s; None for Auto or None.

    Raises
    ------
    InputError
        For anything else.
    """
    if text is None or str(text) in ("Auto", "None"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(text).strip())
    if not match:
        raise InputError(f"time_limit={text}: give minutes, hours:minutes:seconds or days-hours, as for sbatch --time")
    days, *rest = (int(n) if n is not None else None for n in match.groups())
    numbers = [n for n in rest if n is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, numbers[0], 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    return float((((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def _symmetry(extract) -> tuple[str | None, tuple[float, ...] | None]:
    from cctbx import uctbx

    space_group = str(extract.space_group) if extract.space_group is not None else None
    unit_cell = read_cell(extract.unit_cell, "unit_cell")
    if (
        space_group
        and unit_cell
        and not extract.space_group.group().is_compatible_unit_cell(
            uctbx.unit_cell(unit_cell), relative_length_tolerance=0.01, absolute_angle_tolerance=1.0
        )
    ):
        cell = ", ".join(f"{p:g}" for p in unit_cell)
        raise InputError(f"unit_cell {cell} is forbidden by space_group {space_group}")
    return space_group, unit_cell


def _sources(extract, path: PathReader) -> tuple[Source, ...]:
    found: list[Source] = []
    for kind in ("image", "template", "directory"):
        for text in getattr(extract, kind) or []:
            if not text:
                continue
            name, first, last = (text, None, None) if kind == "directory" else _split_range(kind, text)
            found.append(Source(kind, str(path.absolute(name)), first, last))
    return tuple(found)


def _split_range(kind: str, text: str) -> tuple[str, int | None, int | None]:
    match = re.fullmatch(r"(.*?):(-?\d*):(-?\d*)", text)
    if not match:
        return text, None, None
    first, last = _bounds(match[2], match[3], f"{kind}={text}")
    return match[1], first, last


def _bounds(first: str, last: str, where: str) -> tuple[int, int]:
    try:
        bounds = int(first), int(last)
    except ValueError:
        raise InputError(f"{where}: the range must be two numbers, as in 1001:2000") from None
    if bounds[0] < 0 or bounds[1] < bounds[0]:
        raise InputError(f"{where}: the range must go upwards, as in 1001:2000")
    return bounds


def _selection(extract, parameter: str) -> CrystalSelection:
    n_crystals = _how_many(extract.n_crystals, f"{parameter}.n_crystals")
    if not extract.images_to_use:
        return CrystalSelection(n_crystals, None, None)
    where = f"{parameter}.images_to_use={extract.images_to_use}"
    parts = extract.images_to_use.split(":")
    if len(parts) != 2:
        raise InputError(f"{where}: the range must be two numbers, as in 1001:2000")
    return CrystalSelection(n_crystals, *_bounds(parts[0], parts[1], where))


def _how_many(given: Any, parameter: str) -> int:
    if str(given).strip().lower() == "all":
        return ALL_CRYSTALS
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", str(given).strip()):
        raise InputError(f"{parameter}={given}: it must be a number of crystals, or all")
    return int(given)
