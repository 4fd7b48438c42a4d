"""What a simulated data set is made of, as frozen dataclasses that refuse what cannot be simulated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssx_mpi.parameters.declaration import Definition, declared, group, parameter
from ssx_mpi.parameters.user_input import PathReader

COMPRESSIONS = ("bslz4", "lz4", "gzip", "none")


class SimulationError(ValueError):
    """A parameter that cannot be simulated; the message is one line that names it."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SimulationError(message)


# dead rows between modules that an image holds below each other
STACK_GAP = 8


@dataclass(frozen=True)
class DetectorPreset:
    """A pixel detector built of equal modules; lengths in mm, sizes (x, y) in pixels."""

    name: str
    module: tuple[int, int]
    modules: tuple[int, int]
    gap: tuple[int, int]
    pixel_mm: float
    thickness_mm: float
    bit_depth: int
    #: pixels (x, y) of the chips of a module; pixels at the edges between chips are dead. (0, 0) for no chips.
    chip: tuple[int, int] = (0, 0)
    #: modules of the parts that the detector is built of, (x, y) each, from the largest part down; a detector of parts
    #: is described as a tree of panels, one without as one panel
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def n_modules(self) -> int:
        """Number of modules."""
        return self.modules[0] * self.modules[1]

    def path(self, module: int) -> tuple[int, ...]:
        """Numbers of the parts that a module belongs to, from the largest down, and its own; each within the whole."""
        x, y = module % self.modules[0], module // self.modules[0]
        numbers = [x // nx + (y // ny) * -(-self.modules[0] // nx) for nx, ny in self.parts]
        return (*numbers, module)

    def place(self, module: int) -> tuple[int, int]:
        """First pixel (x, y) of a module in the plane of the detector."""
        x, y = module % self.modules[0], module // self.modules[0]
        return x * (self.module[0] + self.gap[0]), y * (self.module[1] + self.gap[1])

    def corner(self, module: int) -> tuple[int, int]:
        """First pixel (x, y) of a module in the image."""
        return (0, module * (self.module[1] + STACK_GAP)) if self.parts else self.place(module)

    @property
    def plane(self) -> tuple[int, int]:
        """Size (x, y) of the detector in pixels, gaps included."""
        (mx, my), (nx, ny), (gx, gy) = self.module, self.modules, self.gap
        return mx * nx + gx * (nx - 1), my * ny + gy * (ny - 1)

    @property
    def size(self) -> tuple[int, int]:
        """Size (x, y) of the image in pixels: the plane, or the modules of a detector of parts below each other."""
        if not self.parts:
            return self.plane
        return self.module[0], self.n_modules * (self.module[1] + STACK_GAP) - STACK_GAP

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (ny, nx) of the image as an array."""
        return self.size[::-1]


# sizes from the manufacturers' data sheets (Eiger2 1M and 4M, Pilatus3 6M and 200K), JUNGFRAU 4M as at SwissFEL, CSPAD
# as at LCLS (64 sensors in pairs, in quadrants), AGIPD 1M as at the European XFEL (16 modules in quadrants)
DETECTORS = {
    preset.name: preset
    for preset in (
        DetectorPreset("eiger1m", (1028, 512), (1, 2), (12, 38), 0.075, 0.45, 16),
        DetectorPreset("eiger4m", (1028, 512), (2, 4), (12, 38), 0.075, 0.45, 16),
        DetectorPreset("pilatus6m", (487, 195), (5, 12), (7, 17), 0.172, 0.32, 32),
        DetectorPreset("pilatus200k", (487, 195), (1, 2), (7, 17), 0.172, 0.32, 32),
        DetectorPreset("jungfrau4m", (1024, 512), (2, 4), (8, 36), 0.075, 0.32, 32, (256, 256), ((1, 1),)),
        DetectorPreset("cspad", (194, 185), (8, 8), (6, 12), 0.10992, 0.5, 16, (0, 0), ((4, 4), (2, 1), (1, 1))),
        DetectorPreset("agipd1m", (512, 128), (2, 8), (14, 9), 0.2, 0.5, 16, (0, 0), ((1, 4), (1, 1))),
    )
}


@dataclass(frozen=True)
class DetectorParameters:
    """The detector as it truly stands.

    Parameters
    ----------
    preset
        Name in :data:`DETECTORS`.
    distance_mm
        From sample to detector, which is perpendicular to the beam.
    centre_offset_mm
        Where the beam meets the detector, (x, y) from the middle of the image.
    bad_pixels
        Number of pixels that are flagged as bad, at random places.
    point_spread
        Standard deviation of the blur by sensor and beam size, pixels.
    noise
        Standard deviation of the readout, photons: above 0 pixels are calibrated, that is floats with this noise about
        their photons, some below zero.
    drift_mm
        How far the detector moves, (x, y), from the first image to the last, evenly.
    """

    preset: str = parameter(
        "detector.preset",
        "choice",
        "eiger1m",
        "Modules, gaps and pixels. The last three are trees of panels.",
        choices=tuple(DETECTORS),
    )
    distance_mm: float = parameter("detector.distance", "float", 70.0, "True distance, mm.")
    centre_offset_mm: tuple[float, float] = parameter(
        "detector.centre_offset",
        "floats",
        (0.6, -0.9),
        "Where the beam truly meets the detector, x,y in mm from its middle.",
        size=2,
    )
    bad_pixels: int = parameter("detector.bad_pixels", "int", 60, "Number of pixels flagged as bad.", level=2)
    point_spread: float = parameter(
        "detector.point_spread", "float", 0.45, "Blur by sensor and beam size, standard deviation in pixels.", level=2
    )
    noise: float = parameter(
        "detector.noise",
        "float",
        0.0,
        "Standard deviation of the readout in photons: above 0 the pixels are calibrated floats, some below zero.",
        level=1,
    )
    drift_mm: tuple[float, float] = parameter(
        "detector.drift",
        "floats",
        (0.0, 0.0),
        "How far the detector moves from the first image to the last, evenly, x,y in mm.",
        size=2,
        level=1,
    )

    def __post_init__(self) -> None:
        _require(self.preset in DETECTORS, f"detector.preset={self.preset}: choose from {', '.join(DETECTORS)}")
        _require(self.distance_mm > 0, f"detector.distance={self.distance_mm:g}: must be above 0 mm")
        _require(self.bad_pixels >= 0, f"detector.bad_pixels={self.bad_pixels}: must not be negative")
        _require(0 <= self.noise <= 100, f"detector.noise={self.noise:g}: must be 0 to 100 photons")
        _require(
            0.2 <= self.point_spread <= 10, f"detector.point_spread={self.point_spread:g}: must be 0.2 to 10 pixels"
        )


@dataclass(frozen=True)
class BeamParameters:
    """The X-ray beam: wavelength in Å, relative bandwidth and divergence (radians) as standard deviations.

    `jitter` is the relative standard deviation of the wavelength from shot to shot; each is written for its image.
    """

    wavelength: float = parameter("beam.wavelength", "float", 0.976, "Angstrom.")
    bandwidth: float = parameter(
        "beam.bandwidth", "float", 1e-4, "Relative standard deviation of the wavelength.", level=1
    )
    divergence: float = parameter(
        "beam.divergence", "float", 5e-5, "Standard deviation of the direction of the beam, radians.", level=2
    )
    polarization_fraction: float = parameter(
        "beam.polarization_fraction", "float", 0.999, "Share of the intensity that is polarized horizontally.", level=2
    )
    jitter: float = parameter(
        "beam.jitter",
        "float",
        0.0,
        "Relative standard deviation of the wavelength from shot to shot, as at an XFEL; each is in the header.",
        level=1,
    )

    def __post_init__(self) -> None:
        _require(0.1 <= self.wavelength <= 10, f"beam.wavelength={self.wavelength:g}: must be 0.1 to 10 Å")
        _require(0 <= self.bandwidth <= 0.02, f"beam.bandwidth={self.bandwidth:g}: must be 0 to 0.02")
        _require(0 <= self.jitter <= 0.02, f"beam.jitter={self.jitter:g}: must be 0 to 0.02")
        _require(0 <= self.divergence <= 0.01, f"beam.divergence={self.divergence:g}: must be 0 to 0.01 radians")
        _require(
            0 <= self.polarization_fraction <= 1,
            f"beam.polarization_fraction={self.polarization_fraction:g}: must be 0 to 1",
        )


@dataclass(frozen=True)
class CrystalParameters:
    """What the crystals share and how they differ.

    Parameters
    ----------
    space_group, unit_cell
        Symbol and the six cell parameters (Å, degrees).
    d_min
        Resolution limit of what is drawn, Å.
    b_factor
        Wilson B factor, Å².
    cell_spread
        Relative standard deviation of the cell parameters that the space group leaves free.
    mosaicity_deg, mosaicity_spread
        Median misorientation of the domains, degrees, and the standard deviation of its logarithm.
    domain_size
        Edge of the coherent domains, Å.
    brightness, brightness_spread
        Photons in a centred reflection of average intensity at zero angle, for the median crystal, and the standard
        deviation of its logarithm from crystal to crystal.
    """

    space_group: str = parameter("space_group", "str", "P43212", "Space group of the crystals.")
    unit_cell: tuple[float, ...] = parameter(
        "unit_cell", "floats", (79.1, 79.1, 38.2, 90.0, 90.0, 90.0), "Mean unit cell, angstrom and degrees.", size=6
    )
    d_min: float = parameter("d_min", "float", 1.6, "Resolution to which reflections are drawn, angstrom.")
    b_factor: float = parameter("crystal.b_factor", "float", 20.0, "Wilson B factor, square angstrom.")
    cell_spread: float = parameter(
        "crystal.cell_spread",
        "float",
        0.001,
        "Relative standard deviation of the free cell parameters from crystal to crystal.",
    )
    mosaicity_deg: float = parameter(
        "crystal.mosaicity",
        "float",
        0.05,
        "Median misorientation of the domains of a crystal, degrees (standard deviation).",
    )
    mosaicity_spread: float = parameter(
        "crystal.mosaicity_spread",
        "float",
        0.2,
        "Standard deviation of the logarithm of the mosaicity from crystal to crystal.",
        level=2,
    )
    domain_size: float = parameter("crystal.domain_size", "float", 2000.0, "Edge of the coherent domains, angstrom.")
    brightness: float = parameter(
        "crystal.brightness",
        "float",
        500.0,
        "Photons in a centred reflection of average intensity at zero angle, for the median crystal.",
    )
    brightness_spread: float = parameter(
        "crystal.brightness_spread",
        "float",
        1.1,
        "Standard deviation of the logarithm of the brightness from crystal to crystal.",
    )

    def __post_init__(self) -> None:
        _require(len(self.unit_cell) == 6, f"unit_cell has {len(self.unit_cell)} numbers: six are needed")
        _require(self.d_min > 0, f"d_min={self.d_min:g}: must be above 0 Å")
        for name in ("cell_spread", "mosaicity_deg", "mosaicity_spread", "b_factor", "brightness", "brightness_spread"):
            _require(
                getattr(self, name) >= 0, f"crystal.{name.removesuffix('_deg')}={getattr(self, name):g}: is negative"
            )
        _require(self.cell_spread <= 0.05, f"crystal.cell_spread={self.cell_spread:g}: must be at most 0.05")
        _require(self.domain_size >= 100, f"crystal.domain_size={self.domain_size:g}: must be 100 Å or more")


@dataclass(frozen=True)
class AnomalousParameters:
    """Atoms that scatter anomalously.

    Parameters
    ----------
    element
        Their chemical symbol; empty for none.
    n_sites
        Independent sites, at random places.
    sites
        Fractional coordinates of the independent sites instead, x, y, z of one after another.
    f_prime, f_double_prime
        Dispersion, electrons; from Sasaki's tables at the wavelength where None.
    """

    element: str = parameter(
        "anomalous.element",
        "str",
        "",
        "Chemical symbol of the atoms that scatter anomalously, such as Se; without it Friedel mates are equal.",
        level=1,
    )
    n_sites: int = parameter(
        "anomalous.n_sites", "int", 4, "Such atoms in the asymmetric unit, at random places.", least=1, level=1
    )
    sites: tuple[float, ...] = parameter(
        "anomalous.sites",
        "floats",
        (),
        "Fractional coordinates x,y,z of these atoms, one after another, instead of random ones.",
        level=1,
    )
    f_prime: float | None = parameter(
        "anomalous.f_prime",
        "float",
        None,
        "f' in electrons, instead of the tables (Sasaki) at the wavelength.",
        level=1,
    )
    f_double_prime: float | None = parameter(
        "anomalous.f_double_prime", "float", None, "f'' in electrons, instead of the tables.", level=1
    )

    def __post_init__(self) -> None:
        _require(
            len(self.sites) % 3 == 0,
            f"anomalous.sites has {len(self.sites)} numbers: three are needed for each site",
        )
        _require(
            self.f_double_prime is None or self.f_double_prime >= 0,
            f"anomalous.f_double_prime={self.f_double_prime or 0:g}: is negative",
        )


@dataclass(frozen=True)
class BackgroundParameters:
    """Smooth scattering: `level` counts per pixel at the water ring, and how that varies between images (logarithm)."""

    level: float = parameter("background.level", "float", 3.0, "Counts per pixel on the water ring.")
    spread: float = parameter(
        "background.spread",
        "float",
        0.15,
        "Standard deviation of the logarithm of the level from image to image.",
        level=1,
    )
    ring_d: float = parameter("background.ring_d", "float", 3.2, "Resolution of the water ring, angstrom.", level=1)
    beamstop_mm: float = parameter(
        "background.beamstop",
        "float",
        1.5,
        "Radius of the shadow of the beamstop on the detector, mm; 0 for none.",
        level=1,
    )

    def __post_init__(self) -> None:
        _require(0 <= self.level <= 1e4, f"background.level={self.level:g}: must be 0 to 10000 counts")
        _require(self.spread >= 0, f"background.spread={self.spread:g}: is negative")
        _require(self.ring_d > 0, f"background.ring_d={self.ring_d:g}: must be above 0 Å")


@dataclass(frozen=True)
class HeaderParameters:
    """What the header says wrongly: header minus truth, mm.

    Parameters
    ----------
    panel_shift_mm, panel_tilt_deg
        Standard deviations of the shifts along, and turns about, each axis of every module where it truly is, against
        the header.
    """

    beam_offset_mm: tuple[float, float] = parameter(
        "header.beam_offset",
        "floats",
        (0.0, 0.0),
        "Error of the beam centre in the header, x,y in mm: header minus truth.",
        size=2,
    )
    distance_offset_mm: float = parameter(
        "header.distance_offset", "float", 0.0, "Error of the distance in the header, mm: header minus truth."
    )
    panel_shift_mm: float = parameter(
        "header.panel_shift",
        "float",
        0.0,
        "Standard deviation of the shifts of the panels against the header, along each axis, mm.",
    )
    panel_tilt_deg: float = parameter(
        "header.panel_tilt",
        "float",
        0.0,
        "Standard deviation of the turns of the panels against the header, about each axis, degrees.",
    )

    def __post_init__(self) -> None:
        _require(0 <= self.panel_shift_mm <= 5, f"header.panel_shift={self.panel_shift_mm:g}: must be 0 to 5 mm")
        _require(0 <= self.panel_tilt_deg <= 5, f"header.panel_tilt={self.panel_tilt_deg:g}: must be 0 to 5 degrees")


def _master_file(name: str, path: PathReader) -> Path:
    """The absolute path of the master file, not of what it may be a link to."""
    return path.cwd / name


def _file_format(given: str, name: str, path: PathReader) -> str:
    """The format, from the name of the file where it is not given."""
    found = given if given != "auto" else "cbf" if Path(name).suffix == ".cbf" else "nxs"
    _require(
        found != "nxs" or Path(name).suffix in (".nxs", ".h5"),
        f"output.file={name}: a NeXus master ends in .nxs or .h5",
    )
    return found


@dataclass(frozen=True)
class OutputParameters:
    """Where the images go, and how."""

    file: Path = declared(
        Definition(
            "output.file",
            "path",
            "simulated.nxs",
            "Master file NAME.nxs, with data files NAME_000001.h5 ..., or NAME.cbf for NAME_00001.cbf ... "
            "(NAME_###.cbf sets the digits). The truth goes into the same folder.",
        ),
        make=_master_file,
        default=Path("simulated.nxs"),
    )
    format: str = declared(
        Definition(
            "output.format",
            "choice",
            "auto",
            "auto: cbf for a file that ends so, otherwise NeXus.",
            choices=("auto", "nxs", "cbf"),
        ),
        uses=("output.file",),
        make=_file_format,
        default="nxs",
    )
    compression: str = parameter("output.compression", "choice", "bslz4", "Of NeXus data files.", choices=COMPRESSIONS)
    images_per_file: int = parameter(
        "output.images_per_file", "int", 25, "Images in each NeXus data file, whatever the number of ranks."
    )
    rotation_axis: bool = parameter(
        "output.rotation_axis",
        "bool",
        False,
        "Write a rotation axis that never turns, as some beamlines do; dxtbx then opens one sequence of stills.",
        level=2,
    )

    def __post_init__(self) -> None:
        _require(self.format in ("nxs", "cbf"), f"output.format={self.format}: choose nxs or cbf")
        _require(
            self.compression in COMPRESSIONS,
            f"output.compression={self.compression}: choose from {', '.join(COMPRESSIONS)}",
        )
        _require(self.images_per_file > 0, f"output.images_per_file={self.images_per_file}: must be 1 or more")


@dataclass(frozen=True)
class SimulationParameters:
    """A whole simulated data set.

    Parameters
    ----------
    lattices
        Relative frequencies of hits with one, two, ... lattices.
    hit_rate
        Probability that an image has a crystal.
    """

    n_images: int = parameter("n_images", "int", 200, "Number of images.", least=1)
    seed: int = parameter("seed", "int", 1, "Seed of all random numbers; the number of ranks does not matter.", least=0)
    hit_rate: float = parameter("hit_rate", "float", 0.3, "Probability that an image has a crystal, 0 to 1.")
    lattices: tuple[float, ...] = parameter(
        "lattices", "floats", (0.85, 0.12, 0.03), "Relative frequencies of hits with one, two, three ... lattices."
    )
    crystal: CrystalParameters = group(CrystalParameters)
    anomalous: AnomalousParameters = group(AnomalousParameters)
    beam: BeamParameters = group(BeamParameters)
    detector: DetectorParameters = group(DetectorParameters)
    background: BackgroundParameters = group(BackgroundParameters)
    header: HeaderParameters = group(HeaderParameters)
    output: OutputParameters = group(OutputParameters)

    def __post_init__(self) -> None:
        _require(self.n_images > 0, f"n_images={self.n_images}: must be 1 or more")
        _require(self.seed >= 0, f"seed={self.seed}: must not be negative")
        _require(0 <= self.hit_rate <= 1, f"hit_rate={self.hit_rate:g}: must be 0 to 1")
        _require(
            len(self.lattices) > 0 and min(self.lattices) >= 0 and sum(self.lattices) > 0,
            "lattices: needs frequencies that are not negative and not all zero",
        )
        preset = DETECTORS[self.detector.preset]
        for name, value in (("shift", self.header.panel_shift_mm), ("tilt", self.header.panel_tilt_deg)):
            _require(
                not value or bool(preset.parts),
                f"header.panel_{name}={value:g}: detector.preset={preset.name} is one panel",
            )
        _require(
            self.output.format == "nxs" or not (preset.parts or self.detector.noise),
            f"output.format={self.output.format}: several panels, and pixels with noise, are written as nxs alone",
        )
        _require(
            self.beam.jitter == 0 or (self.output.format == "nxs" and not self.output.rotation_axis),
            "beam.jitter: wavelengths of single shots need NeXus files without output.rotation_axis",
        )
        distance = self.detector.distance_mm + self.header.distance_offset_mm
        _require(distance > 0, f"header.distance_offset={self.header.distance_offset_mm:g}: leaves a distance below 0")
        _require(
            self.crystal.d_min > self.beam.wavelength / 2,
            f"d_min={self.crystal.d_min:g}: below half the wavelength, {self.beam.wavelength / 2:g} Å",
        )
