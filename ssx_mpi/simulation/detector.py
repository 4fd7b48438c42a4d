"""The simulated detector: true and header models, where rays meet it, which pixels are dead, the smooth background."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ssx_mpi.kernels.rotations import rotation_matrices
from ssx_mpi.kernels.still_simulation import polarization_factor
from ssx_mpi.simulation.simulation_parameters import (
    DETECTORS,
    STACK_GAP,
    BackgroundParameters,
    BeamParameters,
    DetectorParameters,
    DetectorPreset,
    HeaderParameters,
)


@dataclass(frozen=True)
class FlatDetector:
    """A flat detector perpendicular to the beam, which travels along -z; x of the image along +x, y along -y.

    Parameters
    ----------
    preset
        Modules, pixels and sensor.
    distance_mm
        From the sample.
    beam_centre_mm
        (x, y) of the point that the beam meets, from the corner of pixel (0, 0).
    wavelength
        Å; sets the absorption in the sensor.
    """

    preset: DetectorPreset
    distance_mm: float
    beam_centre_mm: tuple[float, float]
    wavelength: float

    @property
    def attenuation_per_mm(self) -> float:
        """Absorption coefficient of silicon, mm⁻¹, from the table that DIALS uses."""
        from cctbx.eltbx import attenuation_coefficient

        return attenuation_coefficient.get_table("Si").mu_at_angstrom(self.wavelength) / 10.0

    def _depth(self, cos: np.ndarray) -> np.ndarray:
        """How far along a ray a photon is absorbed, mm, by the cosine of the angle to the normal.

        It enters the sensor where the ray meets its face and goes on average 1/µ - (l + 1/µ) exp(-µ l) further, l being
        the length of the ray in the sensor (parallax).
        """
        mu = self.attenuation_per_mm
        path = self.preset.thickness_mm / cos
        return 1 / mu - (path + 1 / mu) * np.exp(-mu * path)

    def pixels(self, s1: np.ndarray) -> np.ndarray:
        """Where rays `s1` (n, 3) are recorded, (n, 2) in pixels."""
        u = s1 / np.linalg.norm(s1, axis=1)[:, None]
        cos = -u[:, 2]
        along = self.distance_mm / cos + self._depth(cos)
        x = self.beam_centre_mm[0] + u[:, 0] * along
        y = self.beam_centre_mm[1] - u[:, 1] * along
        return np.column_stack([x, y]) / self.preset.pixel_mm

    def jacobian(self, s1: np.ndarray) -> np.ndarray:
        """Derivative (n, 2, 3) of the pixel position, without parallax, with respect to `s1` (n, 3)."""
        x, y, z = s1.T
        scale = self.distance_mm / self.preset.pixel_mm
        zero = np.zeros_like(x)
        return scale * np.stack(
            [np.stack([-1 / z, zero, x / z**2], axis=1), np.stack([zero, 1 / z, -y / z**2], axis=1)], axis=1
        )

    def directions(self) -> np.ndarray:
        """Unit vectors (ny, nx, 3) from the sample to the middle of each pixel, parallax left out."""
        nx, ny = self.preset.size
        x = (np.arange(nx) + 0.5) * self.preset.pixel_mm - self.beam_centre_mm[0]
        y = self.beam_centre_mm[1] - (np.arange(ny) + 0.5) * self.preset.pixel_mm
        v = np.empty((ny, nx, 3))
        v[..., 0], v[..., 1], v[..., 2] = x, y[:, None], -self.distance_mm
        return v / np.linalg.norm(v, axis=2, keepdims=True)

    def to_dxtbx(self):
        """This detector as a dxtbx Detector of one panel, with the parallax correction."""
        from dxtbx.model import Detector

        bx, by = self.beam_centre_mm
        detector = Detector()
        panel = detector.add_panel()
        panel.set_local_frame((1, 0, 0), (0, -1, 0), (-bx, by, -self.distance_mm))
        self._describe(panel, "/entry/instrument/detector/module", self.preset.size)
        return detector

    def _describe(self, panel, name: str, size: tuple[int, int]) -> None:
        from dxtbx.model import ParallaxCorrectedPxMmStrategy

        mu = self.attenuation_per_mm
        panel.set_type("SENSOR_PAD")
        panel.set_name(name)
        panel.set_pixel_size((self.preset.pixel_mm, self.preset.pixel_mm))
        panel.set_image_size(size)
        panel.set_trusted_range((-1, saturation(self.preset)))
        panel.set_thickness(self.preset.thickness_mm)
        panel.set_material("Si")
        panel.set_mu(mu)
        panel.set_px_mm_strategy(ParallaxCorrectedPxMmStrategy(mu, self.preset.thickness_mm))


@dataclass(frozen=True)
class ModularDetector(FlatDetector):
    """A detector of modules that each stand a little off their places on the flat one.

    Parameters
    ----------
    shift_mm, turn : (n_modules, 3)
        Of each module along and about its fast axis, slow axis and normal (fast x slow), mm and radians; the turns
        about its middle.
    """

    shift_mm: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    turn: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))

    @cached_property
    def frames(self) -> np.ndarray:
        """Fast axis, slow axis and origin (mm) of each module in the laboratory, as columns, (n_modules, 3, 3)."""
        preset, (bx, by) = self.preset, self.beam_centre_mm
        axes = np.array([[1.0, 0, 0], [0, -1.0, 0], [0, 0, -1.0]]).T
        frames = np.empty((preset.n_modules, 3, 3))
        half = np.array([*preset.module, 0]) * preset.pixel_mm / 2
        for module, (shift, turn) in enumerate(zip(self.shift_mm, self.turn)):
            x, y = np.array(preset.place(module)) * preset.pixel_mm
            rotation = rotation_matrices(turn)
            # in the axes of the flat detector
            origin = np.array([x - bx, y - by, self.distance_mm]) + half - rotation @ half + shift
            frames[module] = np.stack([axes @ rotation[:, 0], axes @ rotation[:, 1], axes @ origin], axis=1)
        return frames

    def pixels(self, s1: np.ndarray) -> np.ndarray:
        """Where rays `s1` (n, 3) are recorded, (n, 2) in pixels of the image; far outside of it where on no module."""
        u = s1 / np.linalg.norm(s1, axis=1)[:, None]
        found = np.full((len(s1), 2), -1e6)
        preset = self.preset
        for module, frame in enumerate(self.frames):
            fast, slow, origin = frame.T
            normal = np.cross(fast, slow)
            cos = u @ normal
            cos = np.where(np.abs(cos) < 1e-6, 1e-6, cos)
            place = u * (origin @ normal / cos + self._depth(np.abs(cos)))[:, None] - origin
            xy = np.stack([place @ fast, place @ slow], axis=1) / preset.pixel_mm
            # half a gap around it still belongs to it: spots reach over edges
            on = (cos > 0) & np.all((xy > -3) & (xy < np.array(preset.module) + 3), axis=1)
            found[on] = xy[on] + preset.corner(module)
        return found

    def directions(self) -> np.ndarray:
        """Unit vectors (ny, nx, 3) from the sample to the middle of each pixel; along the beam between modules."""
        preset = self.preset
        v = np.tile([0.0, 0.0, -1.0], (*preset.shape, 1))
        (nx, ny), pixel = preset.module, preset.pixel_mm
        for module, (fast, slow, origin) in enumerate(self.frames.transpose(0, 2, 1)):
            x, y = preset.corner(module)
            along = fast * ((np.arange(nx) + 0.5) * pixel)[:, None]
            down = slow * ((np.arange(ny) + 0.5) * pixel)[:, None]
            v[y : y + ny, x : x + nx] = origin + along[None, :] + down[:, None]
        return v / np.linalg.norm(v, axis=2, keepdims=True)

    def to_dxtbx(self):
        """This detector as a dxtbx Detector, its parts as a tree of panels, with the parallax correction."""
        from dxtbx.model import Detector

        detector = Detector()
        groups: dict[tuple[int, ...], Any] = {(): detector.hierarchy()}
        for module, frame in enumerate(self.frames):
            path = self.preset.path(module)
            for depth in range(1, len(path)):
                if path[:depth] not in groups:
                    groups[path[:depth]] = groups[path[: depth - 1]].add_group()
                    groups[path[:depth]].set_name(part_name(path[:depth]))
            panel = groups[path[:-1]].add_panel()
            panel.set_local_frame(*(tuple(map(float, column)) for column in frame.T))
            self._describe(panel, part_name(path), self.preset.module)
        return detector


def part_name(path: tuple[int, ...]) -> str:
    """Name of a part of a detector in the files."""
    return "/entry/instrument/detector/" + "p" * len(path) + f"{path[-1]:02d}"


def saturation(preset: DetectorPreset) -> int:
    """Highest count that a pixel can hold: the two values above it are the codes of masked and bad pixels."""
    return 2**16 - 3 if preset.bit_depth == 16 else 1_048_500


def true_detector(
    detector: DetectorParameters, beam: BeamParameters, header: HeaderParameters, rng: np.random.Generator
) -> FlatDetector:
    """The detector where it really stands; its modules, which the header has in their places, are off at random."""
    preset = DETECTORS[detector.preset]
    nx, ny = preset.plane
    dx, dy = detector.centre_offset_mm
    centre = (nx * preset.pixel_mm / 2 + dx, ny * preset.pixel_mm / 2 + dy)
    if not preset.parts:
        return FlatDetector(preset, detector.distance_mm, centre, beam.wavelength)
    shape = (preset.n_modules, 3)
    return ModularDetector(
        preset,
        detector.distance_mm,
        centre,
        beam.wavelength,
        header.panel_shift_mm * rng.standard_normal(shape),
        np.radians(header.panel_tilt_deg) * rng.standard_normal(shape),
    )


def header_detector(true: FlatDetector, header: HeaderParameters) -> FlatDetector:
    """The detector as the header of the images describes it."""
    centre = (
        true.beam_centre_mm[0] + header.beam_offset_mm[0],
        true.beam_centre_mm[1] + header.beam_offset_mm[1],
    )
    moved = replace(true, distance_mm=true.distance_mm + header.distance_offset_mm, beam_centre_mm=centre)
    if isinstance(moved, ModularDetector):
        nothing = np.zeros((true.preset.n_modules, 3))
        return replace(moved, shift_mm=nothing, turn=nothing)
    return moved


def drifted(true: FlatDetector, drift_mm: tuple[float, float]) -> FlatDetector:
    """The detector after it moved: the beam meets it elsewhere."""
    centre = (true.beam_centre_mm[0] - drift_mm[0], true.beam_centre_mm[1] - drift_mm[1])
    return replace(true, beam_centre_mm=centre)


def gap_mask(preset: DetectorPreset) -> np.ndarray:
    """Pixels (ny, nx) bool that lie between the modules."""

    def between(module: int, count: int, gap: int) -> np.ndarray:
        return np.arange(module * count + gap * (count - 1)) % (module + gap) >= module

    modules, gaps = preset.modules, preset.gap
    if preset.parts:
        modules, gaps = (1, preset.n_modules), (0, STACK_GAP)
    columns, rows = (between(*v) for v in zip(preset.module, modules, gaps))
    if all(preset.chip):
        # pixels on both sides of the edge between two chips are of another size, and left out
        for dead, module, gap, chip in zip((columns, rows), preset.module, gaps, preset.chip):
            within = np.arange(len(dead)) % (module + gap)
            inner = (within > 0) & (within < module)
            dead |= inner & ((within % chip == 0) | ((within + 1) % chip == 0)) & (within < module - 1)
    return columns[None, :] | rows[:, None]


def bad_pixel_mask(preset: DetectorPreset, number: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels (ny, nx) bool that are flagged as bad: `number` of them, on the modules."""
    bad = np.zeros(preset.shape, bool)
    live = np.flatnonzero(~gap_mask(preset).ravel())
    bad.ravel()[rng.choice(live, min(number, len(live)), replace=False)] = True
    return bad


def background(detector: FlatDetector, beam: BeamParameters, parameters: BackgroundParameters) -> np.ndarray:
    """Expected counts (ny, nx) float32 per pixel of an image without crystal.

    Air and solvent: a rise towards the beam, a broad plateau, and the ring of liquid water at 3.1 to 3.4 Å with its
    weak second shoulder near 2.1 Å; polarized, falling with the solid angle of the pixels, dark behind the beamstop.
    """
    u = detector.directions()
    cos = -u[..., 2]
    q = np.sqrt(np.maximum(0.0, 2 - 2 * cos)) / beam.wavelength
    ring = np.exp(-0.5 * ((q - 1 / parameters.ring_d) / 0.035) ** 2)
    shoulder = 0.2 * np.exp(-0.5 * ((q - 1 / 2.1) / 0.05) ** 2)
    profile = 0.6 * ring + shoulder + 0.4 * np.exp(-((q / 0.6) ** 2)) + 1.2 * np.exp(-q / 0.06)
    profile *= polarization_factor(u, np.array([0.0, 0.0, -1.0]), np.array([0.0, 1.0, 0.0]), beam.polarization_fraction)
    profile *= cos**3
    if parameters.beamstop_mm > 0:
        radius = detector.distance_mm * np.sqrt(1 - cos**2) / cos
        profile *= 1 - np.exp(-((radius / parameters.beamstop_mm) ** 8))
    return (parameters.level * profile).astype(np.float32)
