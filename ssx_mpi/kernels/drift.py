"""Whether a detector, or the beam, moved along a run: shifts of single crystals, and a smooth curve through them.

With the detector held, let r be the residuals of the spots of crystal k, C their derivatives by the parameters of the
crystal and G those by a shift theta of the whole detector along its fast and slow axes and its normal, all weighted.
Eliminating the crystal leaves, for this crystal alone,

    S_k theta = b_k ,   S_k = G^T G - G^T C (C^T C)^-1 C^T G ,   b_k = G^T r - G^T C (C^T C)^-1 C^T r .

With theta(t) = sum_j c_j phi_j(t) along the run, t from 0 to 1, the c_j follow from

    sum_k (phi phi^T)(t_k) x S_k   c   =   sum_k phi(t_k) x b_k ,

sums that do not grow with the number of crystals. Curves are tried from a constant (no drift) and a straight line to
cubic splines of 1, 2, 4 and 8 pieces; each parameter costs the logarithm of the number of crystals (the criterion of
Schwarz, 1978). What crystals scatter beyond the widths of their spots, by a beam that jumps from shot to shot, for
instance, is taken from the crystals themselves: the median of |b - S theta| over sqrt(S), axis by axis, about the
richest of the curves. Crystals beyond five times that are left out.

References
----------
Schwarz, G. (1978). Ann. Statist. 6, 461-464.
Eilers, P. H. C. & Marx, B. D. (1996). Statist. Sci. 11, 89-121 (splines as sums of B-splines).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ssx_mpi.kernels.detector_refinement import (
    DetectorSpots,
    JointGeometry,
    crystal_shifts,
    refine_crystals,
    spots_without_shifts,
)
from ssx_mpi.kernels.exact_sums import Alone, Reducer, exact_binned_sums, exact_median

AXES = ("fast", "slow", "distance")
# the run is cut into so many pieces, in each of which a crystal counts as one in the middle
_BINS = 256
# pieces of the cubic splines that are tried
_PIECES = (1, 2, 4, 8)
# fewer crystals tell nothing of a curve
FEWEST_CRYSTALS = 30
# chi-square per degree of freedom beyond the number that a curve has, that a drift must exceed: one in 10^5 or less of
# curves without a drift does, for 3 to 33 degrees of freedom
_SIGNIFICANT = 5.0
_OUTLIER = 5.0
# after the first round some per cent of the way are left
_MOST_ROUNDS = 4
_MEDIAN = 0.6745
_POINTS = np.linspace(0.0, 1.0, 41)


@dataclass(frozen=True)
class Drift:
    """A detector that moved along a run, against the beam.

    Attributes
    ----------
    position : (m,) float64
        Points along the run, from 0 to 1.
    shift, sigma : (m, 3) float64
        Where the detector was, along its fast and slow axes and its normal, less its mean over the run, mm.
    pieces : int
        Of the spline; 0 for a straight line.
    significance : float
        Square root of the chi-square by which it explains the spots better than a detector at rest.
    """

    position: np.ndarray
    shift: np.ndarray
    sigma: np.ndarray
    pieces: int
    significance: float

    @property
    def extent(self) -> tuple[float, float, float]:
        """Difference between the largest and the least shift along each axis, mm."""
        a, b, c = np.ptp(self.shift, axis=0).tolist()
        return a, b, c

    @property
    def extent_sigma(self) -> tuple[float, float, float]:
        """Its uncertainty."""
        high, low = self.shift.argmax(axis=0), self.shift.argmin(axis=0)
        a, b, c = (float(np.hypot(self.sigma[h, k], self.sigma[l, k])) for k, (h, l) in enumerate(zip(high, low)))
        return a, b, c


def find_drift(
    spots: DetectorSpots,
    geometry: JointGeometry,
    strains: np.ndarray,
    s0: np.ndarray,
    position: np.ndarray,
    reducer: Reducer | None = None,
) -> Drift | None:
    """The way of the detector along a run, None where it stayed in its place as far as the data tell. Collective.

    Parameters
    ----------
    spots, geometry, strains, s0
        Refined crystals on the detector, as for :func:`ssx_mpi.kernels.detector_refinement.refine_crystals`.
    position : (K,) float64
        Of each crystal along the run, from 0 to 1.
    """
    reducer = reducer or Alone()
    total: Drift | None = None
    for _ in range(_MOST_ROUNDS):
        information, score = crystal_shifts(spots, geometry, strains, s0, reducer)
        found = fit_drift(information, score, position, reducer, None if total is None else total.pieces)
        if found is None:
            return total
        # spots that are far off have lost weight: what they say comes out when most of the way is gone
        total = found if total is None else replace(total, shift=total.shift + found.shift)
        shift = np.stack([np.interp(position, found.position, way) for way in found.shift.T], axis=1)
        spots = spots_without_shifts(spots, geometry, strains, s0, shift)
        geometry = refine_crystals(spots, geometry, strains, s0, reducer=reducer).geometry
    return total


def fit_drift(
    information: np.ndarray, score: np.ndarray, position: np.ndarray, reducer: Reducer, pieces: int | None = None
) -> Drift | None:
    """As :func:`find_drift`, from S_k (K, 3, 3) and b_k (K, 3); with `pieces` by that curve, whatever it explains."""
    use = np.all(np.einsum("kaa->ka", information) > 0, axis=1)
    n_crystals = int(reducer.sum(np.array([np.count_nonzero(use)]))[0])
    if n_crystals < FEWEST_CRYSTALS:
        return None
    place = np.clip((position[use] * _BINS).astype(int), 0, _BINS - 1)
    crystals = _Crystals(information[use], score[use], place, reducer)
    if pieces is not None:
        return _drift(_fit(pieces, crystals), 0.0)
    tried = [None, 0, *(pieces for pieces in _PIECES if n_crystals >= 10 * (pieces + 3))]
    # the scatter about the richest curve is what all are measured by
    richest = _fit(tried[-1], crystals)
    rest, *curves = (_fit(pieces, crystals, richest) for pieces in tried)
    curve = min(curves, key=lambda each: np.log(n_crystals) * each.size - each.explained)
    gained, free = curve.explained - rest.explained, curve.size - rest.size
    return _drift(curve, gained) if gained > np.log(n_crystals) * free and gained > _SIGNIFICANT * free + 10 else None


@dataclass(frozen=True)
class _Crystals:
    """S_k (K, 3, 3), b_k (K, 3) and the piece of the run, of :data:`_BINS`, of the crystals of this party."""

    information: np.ndarray
    score: np.ndarray
    place: np.ndarray
    reducer: Reducer

    def sums(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums over the crystals `kept` in each piece of the run, (bins, 3, 3) and (bins, 3). Collective."""
        terms = np.concatenate([self.information.reshape(-1, 9), self.score], axis=1)[kept]
        total = exact_binned_sums(self.reducer, terms, self.place[kept], _BINS)
        return total[:, :9].reshape(-1, 3, 3), total[:, 9:]


@dataclass(frozen=True)
class _Curve:
    """Coefficients (functions, 3), their covariance, what they explain (chi-square), and the scatter about them."""

    pieces: int | None
    coefficients: np.ndarray
    covariance: np.ndarray
    explained: float
    spread: np.ndarray
    kept: np.ndarray

    @property
    def size(self) -> int:
        return self.coefficients.size


def _fit(pieces: int | None, crystals: _Crystals, like: _Curve | None = None) -> _Curve:
    """The curve of so many pieces; with the scatter and the crystals of the curve `like`, if given."""
    functions = _functions(pieces, (np.arange(_BINS) + 0.5) / _BINS)
    size = 3 * functions.shape[1]
    root = np.sqrt(np.einsum("kaa->ka", crystals.information))
    kept = np.ones(len(root), bool) if like is None else like.kept
    spread = np.ones(3) if like is None else like.spread
    for last in (False, False, True) if like is None else (True,):
        information, score = crystals.sums(kept)
        # each axis in units of its scatter
        matrix = np.einsum("ti,tj,tab->iajb", functions, functions, information / np.outer(spread, spread))
        side = np.einsum("ti,ta->ia", functions, score / spread**2).reshape(size)
        covariance = np.linalg.pinv(matrix.reshape(size, size), rcond=1e-12, hermitian=True)
        coefficients = (covariance * side[None, :]).sum(axis=1)
        explained = float((coefficients * side).sum())
        if not last:
            shift = functions @ coefficients.reshape(-1, 3)
            left = np.abs(crystals.score - (crystals.information * shift[crystals.place, None, :]).sum(axis=2)) / root
            spread = np.maximum(exact_median(crystals.reducer, left) / _MEDIAN, 1e-12)
            kept = np.all(left < _OUTLIER * spread, axis=1)
    return _Curve(pieces, coefficients.reshape(-1, 3), covariance, explained, spread, kept)


def _functions(pieces: int | None, position: np.ndarray) -> np.ndarray:
    """Values (n, functions) of the functions of a curve at positions (n,)."""
    if pieces is None:
        return np.ones((len(position), 1))
    if pieces == 0:
        return np.stack([np.ones(len(position)), position - 0.5], axis=1)
    # cubic B-splines on equal intervals, by the recurrence of Cox and de Boor
    knots = np.arange(-3, pieces + 4) / pieces
    at = np.minimum(position, 1 - 1e-12)[:, None]
    values = ((at >= knots[:-1]) & (at < knots[1:])).astype(float)
    for degree in range(1, 4):
        width = degree / pieces
        rising = (at - knots[: -degree - 1]) / width * values[:, :-1]
        falling = (knots[degree + 1 :] - at) / width * values[:, 1:]
        values = rising + falling
    return values


def _drift(curve: _Curve, gained: float) -> Drift:
    functions = _functions(curve.pieces, _POINTS)
    mean = functions.mean(axis=0)
    differences = functions - mean
    shift = differences @ curve.coefficients
    covariance = curve.covariance.reshape(*curve.coefficients.shape, *curve.coefficients.shape)
    variance = np.einsum("mi,iaja,mj->ma", differences, covariance, differences)
    assert curve.pieces is not None
    return Drift(_POINTS, shift, np.sqrt(np.maximum(variance, 0.0)), curve.pieces, float(np.sqrt(gained)))
