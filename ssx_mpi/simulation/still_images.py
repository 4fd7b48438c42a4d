"""Images and their truth, one at a time, from the parameters and the number of the image alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ssx_mpi.kernels import still_simulation as kernel
from ssx_mpi.simulation.anomalous_scattering import anomalous_scatterers
from ssx_mpi.simulation.crystal import (
    MEAN_INTENSITY,
    Structure,
    crystal_symmetry,
    make_structure,
    orthogonalization_reciprocal,
    vary_cell,
)
from ssx_mpi.simulation.detector import (
    FlatDetector,
    background,
    bad_pixel_mask,
    drifted,
    gap_mask,
    header_detector,
    saturation,
    true_detector,
)
from ssx_mpi.simulation.simulation_parameters import SimulationParameters

# width of an rlp, Å⁻¹, for which crystal.brightness is the count of a centred reflection: a usual one
REFERENCE_WIDTH = 4e-4
# a spot counts as visible when its expected signal is this many standard deviations of signal and background
VISIBLE_SIGNIFICANCE = 6.0

# streams of random numbers that a seed splits into; the images have one stream each
_STRUCTURE, _DETECTOR, _IMAGES, _PANELS, _NOISE, _SHOTS, _SITES = range(7)


@dataclass(frozen=True)
class LatticeTruth:
    """A crystal on an image: the true setting matrix (3, 3), its cell and shape, and the spots it should show."""

    A: np.ndarray
    mosaicity_deg: float
    brightness: float
    visible_spots: int


@dataclass(frozen=True)
class ImageTruth:
    """What is on image `index` (0-based)."""

    index: int
    lattices: tuple[LatticeTruth, ...]

    @property
    def visible_spots(self) -> int:
        return sum(lattice.visible_spots for lattice in self.lattices)


class Simulator:
    """Makes any image of a simulated data set; every instance with the same parameters makes the same ones.

    Parameters
    ----------
    parameters
        The whole data set.
    structure
        The intensities if they were drawn already, as :func:`make_structure` draws them.
    """

    def __init__(self, parameters: SimulationParameters, structure: Structure | None = None) -> None:
        self.parameters = parameters
        self.structure = structure or self._make_structure()
        self.detector: FlatDetector = true_detector(
            parameters.detector, parameters.beam, parameters.header, self._rng(_PANELS)
        )
        self.header: FlatDetector = header_detector(self.detector, parameters.header)
        self.gaps = gap_mask(self.detector.preset)
        self.bad = bad_pixel_mask(self.detector.preset, parameters.detector.bad_pixels, self._rng(_DETECTOR))
        self.background = background(self.detector, parameters.beam, parameters.background)
        self._intensity = self.structure.intensity

    def _make_structure(self) -> Structure:
        p = self.parameters
        scatterers = anomalous_scatterers(
            p.anomalous, crystal_symmetry(p.crystal), p.beam.wavelength, self._rng(_SITES)
        )
        return make_structure(p.crystal, self._rng(_STRUCTURE), scatterers)

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.parameters.seed, spawn_key=stream)))

    @cached_property
    def dead(self) -> np.ndarray:
        """Pixels (ny, nx) bool without a count: gaps and bad ones."""
        return self.gaps | self.bad

    def image(self, index: int) -> tuple[np.ndarray, ImageTruth]:
        """Counts and truth of image `index`, 0-based.

        Returns
        -------
        counts : (ny, nx) int32, or float32 where pixels are calibrated
            -1 in the gaps, -2 in bad pixels, :func:`saturation` where more came.
        truth : ImageTruth
        """
        rng = self._rng(_IMAGES, index)
        p = self.parameters
        expected = self.background * np.float32(np.exp(p.background.spread * rng.standard_normal()))
        smooth = expected.copy()
        detector = self.detector_at(index)
        wavelength = self.wavelength(index)
        lattices = tuple(
            self._add_crystal(expected, smooth, rng, detector, wavelength) for _ in range(self._draw_lattices(rng))
        )
        counts = kernel.poisson_counts(expected, rng)
        np.minimum(counts, saturation(self.detector.preset), out=counts)
        if p.detector.noise:
            noise = self._rng(_NOISE, index).standard_normal(counts.shape, np.float32)
            counts = counts.astype(np.float32) + np.float32(p.detector.noise) * noise
        counts[self.gaps] = -1
        counts[self.bad] = -2
        return counts, ImageTruth(index, lattices)

    def wavelength(self, index: int) -> float:
        """Wavelength of the shot that made image `index`, Å."""
        beam = self.parameters.beam
        if not beam.jitter:
            return beam.wavelength
        return beam.wavelength * (1 + beam.jitter * float(self._rng(_SHOTS, index).standard_normal()))

    def detector_at(self, index: int) -> FlatDetector:
        """The true detector as it stands when image `index` is taken."""
        p = self.parameters
        if not any(p.detector.drift_mm):
            return self.detector
        share = index / max(p.n_images - 1, 1)
        dx, dy = p.detector.drift_mm
        return drifted(self.detector, (share * dx, share * dy))

    def _draw_lattices(self, rng: np.random.Generator) -> int:
        p = self.parameters
        if rng.random() >= p.hit_rate:
            return 0
        frequencies = np.array(p.lattices) / sum(p.lattices)
        return 1 + int(rng.choice(len(frequencies), p=frequencies))

    def _add_crystal(
        self,
        expected: np.ndarray,
        smooth: np.ndarray,
        rng: np.random.Generator,
        detector: FlatDetector,
        wavelength: float,
    ) -> LatticeTruth:
        p = self.parameters.crystal
        U = kernel.random_rotation(rng)
        cell = vary_cell(self.structure.symmetry, p.cell_spread, rng)
        brightness = p.brightness * float(np.exp(p.brightness_spread * rng.standard_normal()))
        mosaicity_deg = p.mosaicity_deg * float(np.exp(p.mosaicity_spread * rng.standard_normal()))
        A = U @ orthogonalization_reciprocal(cell)
        spots = self.spots(A, mosaicity_deg, wavelength)
        counts = brightness * self.relative_counts(spots)
        centre, covariance = self.project(spots, detector)
        # what is too weak for one photon in ten images need not be drawn, nor what misses the detector
        size = np.array(self.detector.preset.size)
        drawn = (counts > 0.1) & np.all((centre > -20) & (centre < size + 20), axis=1)
        centre, covariance, counts = centre[drawn], covariance[drawn], counts[drawn]
        kernel.add_spots(expected, centre, covariance, counts)
        return LatticeTruth(A, mosaicity_deg, brightness, self._visible(smooth, centre, covariance, counts))

    def spots(self, A: np.ndarray, mosaicity_deg: float, wavelength: float | None = None) -> kernel.StillSpots:
        """Reflections that a crystal with setting matrix `A` shows on a still, at the mean wavelength or another, Å."""
        p = self.parameters
        # Scherrer: a cube of edge D broadens a peak to 0.9 / D, full width at half maximum
        shape = kernel.RlpShape(
            mosaicity=np.radians(mosaicity_deg),
            domain=0.9 / p.crystal.domain_size / np.sqrt(8 * np.log(2)),
            bandwidth=p.beam.bandwidth,
            divergence=p.beam.divergence,
        )
        s0 = np.array([0.0, 0.0, -1.0 / (wavelength or p.beam.wavelength)])
        return kernel.still_spots(self.structure.hkl, A, s0, shape, p.crystal.d_min)

    def relative_counts(self, spots: kernel.StillSpots) -> np.ndarray:
        """Expected photons (n,) of spots for a crystal of brightness 1."""
        share = kernel.partiality(spots.offset, spots.width, REFERENCE_WIDTH)
        polarization = kernel.polarization_factor(
            spots.s1, np.array([0.0, 0.0, -1.0]), np.array([0.0, 1.0, 0.0]), self.parameters.beam.polarization_fraction
        )
        return self._intensity[spots.index] / MEAN_INTENSITY * share * polarization

    def project(self, spots: kernel.StillSpots, detector: FlatDetector | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Centres (n, 2) and covariances xx, xy, yy (n, 3) of spots on the true detector, or on `detector`, pixels."""
        detector = detector or self.detector
        jacobian = detector.jacobian(spots.s1)
        c = np.einsum("nik,nkl,njl->nij", jacobian, spots.covariance, jacobian)
        blur = self.parameters.detector.point_spread**2
        covariance = np.column_stack([c[:, 0, 0] + blur, c[:, 0, 1], c[:, 1, 1] + blur])
        return detector.pixels(spots.s1), covariance

    def _visible(self, smooth: np.ndarray, centre: np.ndarray, covariance: np.ndarray, counts: np.ndarray) -> int:
        """Number of spots on live pixels that stand out of noise and background within two standard deviations."""
        size = np.array(self.detector.preset.size)
        on = np.all((centre >= 0) & (centre < size), axis=1)
        x, y = centre[on].astype(int).T
        area = 4 * np.pi * np.sqrt(covariance[on, 0] * covariance[on, 2] - covariance[on, 1] ** 2)
        signal = counts[on]
        significance = signal / np.sqrt(signal + smooth[y, x] * area)
        return int(np.sum((significance >= VISIBLE_SIGNIFICANCE) & ~self.dead[y, x]))
