"""The parameters of ``ssx_mpi``, declared once: the frozen dataclasses, of which the PHIL that users see is made.

The names are those that xia2's SSX pipeline has taught its users. Everything after :func:`read` works with
:class:`Parameters`; no other module reads PHIL of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssx_mpi.parameters import declaration, reduction_parameters
from ssx_mpi.parameters.declaration import AUTO, Definition, declared, group, parameter
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.parameters.user_input import InputError, PathReader, check_limits, identity

#: parameters of xia2.ssx that have no effect here, and why
WITHOUT_MEANING = {
    "multiprocessing.njobs": "one job has all nodes: ssx_mpi.submit",
    "reduction_batch_size": "all crystals are reindexed together",
    "filtering.remove_filtered_reflections": "scaled files keep what was integrated",
}

#: steps that are done with each image, in their order
STEPS = ("find_spots", "index", "integrate")
#: the step that is done with all crystals together, after those
REDUCE = "reduce"

#: the gain that the images tell
GAIN_AUTO = "auto"

#: ellipsoid models by the names of the newest DIALS
RLP_MOSAICITY = ("simple1", "simple6", "simple1angular1", "simple1angular3", "simple6angular1")


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

    shift: float | None = parameter(
        "geometry_refinement.panel_shift",
        "float",
        AUTO,
        "How far parts are expected from where the header has them, along each axis, in mm: a part with few spots is "
        "held to its neighbours accordingly. By default the data tell.",
        least=0.001,
        level=1,
    )
    tilt: float | None = parameter(
        "geometry_refinement.panel_tilt",
        "float",
        AUTO,
        "The same for turns about each axis, in degrees.",
        least=0.001,
        level=1,
    )


@dataclass(frozen=True)
class ReportSettings:
    """The page about the run, where a copy goes, the resolution that its forecast is for, and lines of JSON."""

    html: bool = parameter(
        "report.html",
        "bool",
        True,
        "Write ssx_mpi.html at the end: a page with figures about the run. ssx_mpi.report does so at any time.",
        level=1,
    )
    copy_to: Path | None = parameter(
        "report.copy_to",
        "folder",
        None,
        "Folder that gets a copy of it as report.html, as electronic logbooks show it.",
        level=1,
    )
    live: bool = parameter(
        "enable_live_reporting",
        "bool",
        False,
        "Write live.jsonl: a line of JSON for each image as it is finished, as beamlines plot them.",
        level=1,
    )
    d_min: float | None = parameter(
        "forecast.d_min",
        "float",
        None,
        "Resolution in angstrom for which the report says how many more crystals are needed; by default a tenth beyond "
        "where the data end.",
        least=0.1,
        level=1,
    )


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
    """Limits on the pixels of a strong spot, and a file for DIALS."""

    min_spot_size: int = parameter(
        "spotfinding.min_spot_size", "int", 3, "Fewest pixels of a strong spot.", least=1, level=1
    )
    max_spot_size: int = parameter(
        "spotfinding.max_spot_size", "int", 20, "Most pixels of a strong spot.", least=1, level=1
    )
    phil: Path | None = parameter("spotfinding.phil", "file", None, "DIALS parameters for dials.find_spots.", level=2)


@dataclass(frozen=True)
class Integration:
    """The profile model, and a file for DIALS."""

    algorithm: str = parameter(
        "integration.algorithm",
        "choice",
        "ellipsoid",
        "Profile model: ellipsoids refined for each crystal, or the older stills model.",
        choices=("ellipsoid", "stills"),
        level=1,
    )
    rlp_mosaicity: str = parameter(
        "integration.ellipsoid.rlp_mosaicity",
        "choice",
        "simple6",
        "Shape of the reciprocal lattice points, by its name in the newest DIALS.",
        choices=RLP_MOSAICITY,
        level=2,
    )
    phil: Path | None = parameter(
        "integration.phil", "file", None, "DIALS parameters for dials.ssx_integrate.", level=2
    )


# the readers of what several parameters make up; a field that is declared below with one names it


def _read_sources(images: Any, templates: Any, directories: Any, path: PathReader) -> tuple[Source, ...]:
    found: list[Source] = []
    for kind, texts in (("image", images), ("template", templates), ("directory", directories)):
        for text in filter(None, texts or ()):
            name, first, last = (text, None, None) if kind == "directory" else _split_range(kind, text)
            found.append(Source(kind, str(path.absolute(name)), first, last))
    return tuple(found)


def _selection(scope: str, kind: str, default: Any, purpose: str, **limits: Any) -> Any:
    """A field with the number of crystals and the range of images that a stage takes."""

    def make(n_crystals: Any, images: str | None, path: PathReader) -> CrystalSelection:
        count = _how_many(n_crystals, f"{scope}.n_crystals")
        if not images:
            return CrystalSelection(count, None, None)
        where = f"{scope}.images_to_use={images}"
        parts = images.split(":")
        if len(parts) != 2:
            raise InputError(f"{where}: the range must be two numbers, as in 1001:2000")
        return CrystalSelection(count, *_bounds(parts[0], parts[1], where))

    which = "Use just these images for it, as first:last, counted from one over all the images."
    return declared(
        Definition(f"{scope}.n_crystals", kind, default, purpose, **limits),
        Definition(f"{scope}.images_to_use", "str", None, which, level=1),
        make=make,
    )


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Everything that one run was asked for; paths are absolute.

    ``unit_cell`` holds a, b, c in angstrom and alpha, beta, gamma in degrees, ``space_group`` the Hermann-Mauguin
    symbol with its setting, resolutions are in angstrom. ``nproc`` is None for as many as there are cores,
    ``time_limit`` (seconds) None for that of the Slurm job, if any; ``image_timeout`` is in seconds.
    """

    sources: tuple[Source, ...] = declared(
        Definition(
            "image",
            "str",
            None,
            "Image file, HDF5/NeXus or CBF; may be given more than once. image=file.h5:1001:2000 selects an inclusive "
            "range of images, counted from one.",
            multiple=True,
        ),
        Definition(
            "template",
            "str",
            None,
            "Image sequence template such as lyso_1_###.cbf; may be given more than once. template:1:500 selects an "
            "inclusive range of the numbers in the names.",
            multiple=True,
        ),
        Definition(
            "directory",
            "str",
            None,
            "Folder of images: all of its .cbf files or, where there are none, its master, .nxs or .h5 files.",
            multiple=True,
        ),
        make=lambda *given: _read_sources(*given),
    )
    space_group: str | None = parameter(
        "space_group",
        "space_group",
        None,
        "Space group of the crystals. Without it and unit_cell the program assesses the crystals and stops.",
    )
    unit_cell: tuple[float, ...] | None = parameter(
        "unit_cell",
        "cell",
        None,
        "Unit cell of the crystals in angstrom and degrees: a,b,c,alpha,beta,gamma.",
        aliases=("indexing.unit_cell",),
    )
    stills: bool = parameter(
        "stills",
        "bool",
        False,
        "Take images as stills although their headers say that the crystal turns; otherwise they are refused.",
        level=1,
        affects_results=False,
    )
    reference_geometry: Path | None = parameter(
        "reference_geometry",
        "file",
        None,
        "Experiment list with a refined detector and beam, to use as they are; no geometry refinement is done.",
    )
    starting_geometry: Path | None = parameter(
        "starting_geometry",
        "file",
        None,
        "Experiment list whose detector and beam replace those of the image headers before geometry refinement.",
    )
    mask: Path | None = parameter(
        "mask",
        "file",
        None,
        "DIALS mask file; its masked pixels are used neither for spots nor for integration.",
    )
    gain: float | str | None = declared(
        Definition(
            "gain",
            "str",
            None,
            "Pixel values to a photon, where these are no photons: a number, or auto for what the scatter of the "
            "background says. By default the headers are believed, and what the background says of it is a warning.",
            level=1,
            auto=True,
        ),
        make=lambda text, path: _gain(text),
        default=None,
    )
    d_min: float | None = parameter(
        "d_min",
        "float",
        None,
        "High-resolution limit in angstrom, for spot finding and integration, and so for what is there to be reduced. "
        "Where merged.mtz ends within it is estimated, unless reduction.d_min is given.",
        least=0,
    )
    d_max: float | None = parameter(
        "d_max",
        "float",
        None,
        "Low-resolution limit in angstrom, for spot finding and, unless reduction.d_max is given, reduction.",
        least=0,
    )
    max_lattices: int = parameter(
        "max_lattices",
        "int",
        3,
        "Most lattices to index on one image.",
        least=1,
        aliases=("indexing.max_lattices",),
    )
    min_spots: int = parameter(
        "min_spots",
        "int",
        10,
        "Images with fewer strong spots are not hits and are not indexed.",
        least=1,
        aliases=("indexing.min_spots",),
    )
    batch_size: int = parameter(
        "batch_size", "int", 1000, "Number of images whose results are written and reported together.", least=1, level=1
    )
    nproc: int | None = parameter(
        "nproc",
        "int",
        AUTO,
        "MPI ranks to start when not under mpirun or srun already; Auto is the cores this process may use.",
        least=1,
        aliases=("multiprocessing.nproc",),
        affects_results=False,
    )
    steps: tuple[str, ...] = declared(
        Definition(
            "steps",
            "choices",
            (*STEPS, REDUCE),
            "Steps to run after geometry refinement; each also alone, from the files of the one before. None refines "
            "the geometry only. Reduction (reduction.*) merges the integrated crystals of all batches.",
            choices=(*STEPS, REDUCE),
            optional=True,
            aliases=("workflow.steps",),
        ),
        make=lambda *given: _steps(*given),
        affects_results=False,
    )
    engine: str = parameter(
        "engine",
        "choice",
        "fast",
        "fast: our own kernels, for the same answers in a fraction of the time; what they do not cover is left to "
        "DIALS, and the log says so. dials: the algorithms of DIALS as they are. Reduction has reduction.engine.",
        choices=("fast", "dials"),
    )
    keep_intermediate: bool = parameter(
        "keep_intermediate",
        "bool",
        True,
        "Write strong spots and indexed crystals too, not only the integrated ones.",
        level=1,
    )
    restart: bool = parameter(
        "restart",
        "bool",
        False,
        "Begin anew in an output folder that holds a run, removing what that run wrote.",
        affects_results=False,
    )
    time_limit: float | None = declared(
        Definition(
            "time_limit",
            "str",
            AUTO,
            "Time that this run may take, as Slurm writes it (minutes, or hours:minutes:seconds). It stops in order "
            "shortly before and the same command goes on. Auto is what is left of the Slurm job that it runs in.",
        ),
        make=lambda text, path: read_duration(text),
        affects_results=False,
    )
    image_timeout: float = parameter(
        "image_timeout",
        "float",
        300,
        "An image that takes longer than this many seconds is abandoned and counted as a failure.",
        least=1,
        level=1,
        affects_results=False,
    )
    max_failures: float = parameter(
        "max_failures",
        "float",
        0.98,
        "Stop early when more than this share of the images fails in one way: cannot be read, of all; not indexed, of "
        "the hits; not integrated, of those indexed. 1 never stops.",
        least=0,
        most=1,
        level=1,
        affects_results=False,
    )
    directory: Path = parameter(
        "output.directory", "folder", ".", "Folder for everything that the run writes.", affects_results=False
    )
    import_phil: Path | None = parameter(
        "dials_import.phil",
        "file",
        None,
        "DIALS parameters for importing images (the format and geometry scopes of dials.import).",
        level=2,
    )
    spotfinding: Spotfinding = group(Spotfinding)
    indexing_phil: Path | None = parameter(
        "indexing.phil", "file", None, "DIALS parameters for dials.ssx_index.", level=2
    )
    geometry: CrystalSelection = _selection(
        "geometry_refinement",
        "str",
        "250",
        "Number of crystals, from the first image on, for the joint refinement of the detector; all takes those of all "
        "images.",
    )
    restrain_cell: bool = parameter(
        "geometry_refinement.restrain_cell",
        "bool",
        False,
        "Hold the cells to unit_cell while the detector is refined, for few crystals.",
        level=1,
    )
    final_geometry: bool = parameter(
        "geometry_refinement.final",
        "bool",
        False,
        "When all batches are done, refine once more with all indexed crystals of the run, and say whether integrating "
        "again with that geometry (geometry_refinement/final.expt) would gain.",
        level=1,
        affects_results=False,
    )
    hierarchy_level: int | None = parameter(
        "geometry_refinement.hierarchy_level",
        "int",
        AUTO,
        "Refine the parts of the detector down to this level of its tree of panels: 0 for the whole alone, 1 for the "
        "parts of the whole, and so on. By default the level that brings crystals that were left out closest to their "
        "spots.",
        least=0,
        level=1,
    )
    panel_priors: PanelPriors = group(PanelPriors)
    beam_search: bool = parameter(
        "geometry_refinement.beam_search",
        "bool",
        True,
        "Look for the beam centre in the spots of the first hits before anything is indexed.",
        level=2,
    )
    refinement_phil: Path | None = parameter(
        "geometry_refinement.phil", "file", None, "DIALS parameters for dials.refine.", level=2
    )
    assess: CrystalSelection = _selection(
        "assess_crystals",
        "int",
        250,
        "Number of crystals to assess where unit cell or space group is unknown.",
        least=1,
    )
    integration: Integration = group(Integration)
    live_merge: bool = parameter(
        "live_merge",
        "bool",
        False,
        "Show completeness, multiplicity and CC1/2 of all crystals so far, as each batch finishes.",
        affects_results=False,
    )
    report: ReportSettings = group(ReportSettings, affects_results=False)
    #: what the crystals are is settled before; the reduction has an identity of its own
    reduction: ReductionParameters = group(ReductionParameters, "reduction.", affects_results=False)
    #: the assignments that make it what it is, for a command line
    reduction_given: tuple[str, ...] = field(default=(), metadata={"affects_results": False})
    #: full names of the parameters that were given: these win over a file for DIALS, our defaults do not
    typed: tuple[str, ...] = ()
    #: lines for the log about what was given
    notes: tuple[str, ...] = field(default=(), metadata={"affects_results": False})

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


def scope() -> Any:
    """The PHIL scope object of ``ssx_mpi``."""
    import iotbx.phil

    return iotbx.phil.parse(declaration.phil_text(declaration.definitions(Parameters)))


def read(extract: Any, cwd: Path, typed: Iterable[str] = (), notes: Iterable[str] = ()) -> Parameters:
    """The dataclasses for an extracted PHIL scope.

    Parameters
    ----------
    extract
        ``scope_extract`` of :func:`scope`.
    cwd
        Absolute folder that relative paths are relative to.
    typed
        Full names of the parameters that the user gave.
    notes
        Lines for the log about what was given.

    Raises
    ------
    InputError
        For a file that is not there, a malformed range, limits at odds with each other, or a cell that is none or that
        the space group forbids.
    """
    declaration.check_values(extract, declaration.definitions(Parameters))
    path = PathReader(cwd)
    parameters = declaration.read(
        Parameters,
        extract,
        path,
        reduction=reduction_parameters.read(extract, path, "reduction.", d_max=extract.d_max),
        reduction_given=tuple(_reduction_given(extract, path)),
        typed=tuple(sorted(typed)),
        notes=tuple(notes),
    )
    _check(parameters)
    return parameters


def default_identity() -> dict[str, str]:
    """The identity of a run for which nothing was given."""
    return read(scope().extract(), Path("/")).identity()


def _check(p: Parameters) -> None:
    """Refuse what is at odds with something else."""
    check_limits(p.d_min, p.d_max)
    smallest, largest = p.spotfinding.min_spot_size, p.spotfinding.max_spot_size
    if smallest > largest:
        raise InputError(f"spotfinding.min_spot_size={smallest} is above spotfinding.max_spot_size={largest}")
    if p.space_group is not None and p.unit_cell is not None:
        _check_symmetry(p.space_group, p.unit_cell)


def _reduction_given(extract: Any, path: PathReader) -> Iterator[str]:
    """What differs from the defaults in the scope of the reduction, as on a command line, with absolute paths."""
    master = scope()
    for found in master.fetch_diff(source=master.format(python_object=extract)).all_definitions():
        if not found.path.startswith("reduction."):
            continue
        value = " ".join(word.value for word in found.object.words)
        is_path = found.object.type is not None and found.object.type.phil_type == "path"
        yield f"{found.path}={path.absolute(value) if is_path else value}"


def _gain(given: Any) -> float | str | None:
    """A positive number, "auto", or None."""
    if given is None or str(given) == "None":
        return None
    if str(given).lower() == GAIN_AUTO:
        return GAIN_AUTO
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise InputError(f"gain={given}: it must be a positive number, or auto")
    return value


def _steps(given: list[str] | None, path: PathReader) -> tuple[str, ...]:
    """Steps in their order."""
    steps = tuple(s for s in (*STEPS, REDUCE) if s in (given or ()))
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


def _check_symmetry(space_group: str, unit_cell: tuple[float, ...]) -> None:
    from cctbx import sgtbx, uctbx

    if not (
        sgtbx.space_group_info(space_group)
        .group()
        .is_compatible_unit_cell(
            uctbx.unit_cell(unit_cell), relative_length_tolerance=0.01, absolute_angle_tolerance=1.0
        )
    ):
        cell = ", ".join(f"{p:g}" for p in unit_cell)
        raise InputError(f"unit_cell {cell} is forbidden by space_group {space_group}")


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


def _how_many(given: Any, name: str) -> int:
    if str(given).strip().lower() == "all":
        return ALL_CRYSTALS
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", str(given).strip()):
        raise InputError(f"{name}={given}: it must be a number of crystals, or all")
    return int(given)
