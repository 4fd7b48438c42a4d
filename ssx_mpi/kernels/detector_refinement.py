"""A detector of many sensors fitted to many stills at once, each with an orientation and a cell of its own.

The detector is a tree: the whole, its quadrants or modules, their sensors. Every node of every level down to the one
that is refined moves as one body, by three shifts along and three turns about the axes of its own frame (fast, slow,
normal; the turns about its centre); with it go the nodes below. For crystal k there are three rotations and the strains
that its symmetry allows. Residuals are x and y on the panel and delta psi, as in
:mod:`ssx_mpi.kernels.lattice_refinement`, which also has the derivatives by the crystals.

**Derivatives by the detector.** A ray of direction s1 meets the panel d = (fast, slow, origin) where d v = s1, at
x = v_0 / v_2, y = v_1 / v_2, that is at X = s1 / v_2 in the laboratory. With rows e_i of the inverse of d, a panel that
is moved by t and turned by the small w about c moves the point on it by

    (dx, dy) = -J (t + w x (X - c)),   J = (e_0 - x e_2, e_1 - y e_2) .

**Elimination of the crystals.** With g the parameters of the detector and c_k those of crystal k, the normal equations
of Gauss and Newton are

    [ N_gg   N_gk ... ] [dg ]   [b_g]
    [ N_kg   N_kk     ] [dc_k] = [b_k] ,

and no crystal meets another. Eliminating the crystals (Schur complement) leaves equations of the detector alone,

    (N_gg - sum_k N_gk N_kk^-1 N_kg) dg = b_g - sum_k N_gk N_kk^-1 b_k ,   dc_k = N_kk^-1 (b_k - N_kg dg) ,

so that a step costs a time proportional to the number of spots. The sums over crystals are taken in blocks of fixed
crystals and rounded to a common grid (:mod:`ssx_mpi.kernels.exact_sums`): the parties of a parallel refinement, each
with crystals of its own, exchange only the small matrix, and get the same bits however many they are.

**Gauge and priors.** What the data cannot tell is settled in two ways. The turn of the whole about its normal is held:
it is that of all crystals about the beam. The motion theta of a node below the whole is relative to the node above it,
and
is drawn from a normal distribution about none, of a width that is given or learned from the data: to -2 log L is
added sum (theta / width)^2. So the common motion of the nodes of a level goes, as far as it can, to the node above,
where it costs less, and is not counted twice; a sensor with few spots stays with its neighbours, one without any does
not move; and a distance of a panel that trades off with cells is held to what its tree says.

**Uncertainties.** The inverse of the reduced matrix is the covariance of g (given the priors). The mean over the
crystals of the relative change of a cell length, m = 1/K sum_k w.c_k, has, with u = 1/K sum_k N_gk N_kk^-1 w,

    cov(m, g) = -u^T cov(g),   var(m) = 1/K^2 sum_k w^T N_kk^-1 w + u^T cov(g) u .

Outliers get Tukey's weights from the median absolute deviations of the residuals of all parties, afresh in every step.

References
----------
MacKay, D. J. C. (1992). Neural Comput. 4, 415-447 (widths of the priors).
Brewster, A. S. et al. (2018). Acta Cryst. D74, 877-894 (hierarchies, and crystals as sparse parameters).
Blobel, V. (2006). Nucl. Instrum. Methods A 566, 5-13 (elimination of local parameters: Millepede-II).
Waterman, D. G. et al. (2016). Acta Cryst. D72, 558-575.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ssx_mpi.kernels._library import array, c_int, c_int64, declare
from ssx_mpi.kernels.exact_sums import Alone, GridSum, Reducer, exact_median, exact_sums
from ssx_mpi.kernels.lattice_refinement import prediction_gradients
from ssx_mpi.kernels.rotations import GENERATORS, rotation_matrices

# of a node: shifts in mm along its axes, the normal pointing away from the crystal; turns in radians about them
NODE_PARAMETERS = ("shift_fast", "shift_slow", "distance", "tilt_fast", "tilt_slow", "turn")
# those of the whole detector, which is not turned about its normal
GLOBAL_NAMES = NODE_PARAMETERS[:5]
# crystals whose sums are taken together; a party holds whole blocks
BLOCK = 256
# 95% efficient for normal residuals, with two degrees of freedom for a position and one for delta psi
_TUKEY_XY, _TUKEY_PSI = 6.0, 5.0
# median of |x| of a normal distribution of width one, and of its length in two dimensions
_MEDIAN_1, _MEDIAN_2 = 0.6745, 1.1774


@dataclass(frozen=True)
class DetectorSpots:
    """Indexed spots of all crystals that a party holds.

    Attributes
    ----------
    hkl : (n, 3) float64
        Miller indices.
    crystal : (n,) int64
        Number of the crystal of each spot, ascending.
    panel : (n,) int64
        Number of its panel.
    xy : (n, 2) float64
        Observed position on the panel, mm.
    number : (K,) int64, optional
        Numbers of the crystals among those of all parties, ascending; from 0 on where there is one party.
    """

    hkl: np.ndarray
    crystal: np.ndarray
    panel: np.ndarray
    xy: np.ndarray
    number: np.ndarray | None = None


@dataclass(frozen=True)
class GivenWeights:
    """Weights that are not found from the residuals.

    Attributes
    ----------
    spot : (n,) float64
        Of each spot; none is an outlier but those of weight 0.
    width : (3,) float64
        Standard deviations of x, y (mm) and delta psi (radians).
    """

    spot: np.ndarray
    width: np.ndarray


@dataclass(frozen=True)
class PanelLevel:
    """One level of the tree of a detector.

    Attributes
    ----------
    node : (n_panels,) int64
        Number of the node that each panel belongs to; all from 0 on occur.
    widths : (6,) float64
        Of the prior distributions of the motion of a node against the node above it, :data:`NODE_PARAMETERS`; infinite
        for the whole. They are those to start from where `learned`.
    learned : (6,) bool
        Which of the widths come from the data, together with the motions.
    """

    node: np.ndarray
    widths: np.ndarray
    learned: np.ndarray

    @property
    def n_nodes(self) -> int:
        return int(self.node.max()) + 1


@dataclass(frozen=True)
class JointGeometry:
    """Everything that is refined.

    Attributes
    ----------
    panels : (n_panels, 3, 3) float64
        Matrix d of each panel, its columns the fast axis, the slow axis and the origin (mm).
    a_matrices : (K, 3, 3) float64
        A = U B of each crystal, 1/angstrom.
    middle : (n_panels, 2) float64
        Middle of each panel in its own frame, mm: a node turns about the mean of the middles of its panels.
    levels : tuple of PanelLevel
        Those refined; the first is the whole.
    frames : tuple of (n_nodes, 3, 3) float64
        Frames of the nodes, level by level, as `panels`.
    motions : tuple of (n_nodes, 6) float64
        Motion of each node since the start, :data:`NODE_PARAMETERS`, without those of the nodes above it.
    """

    panels: np.ndarray
    a_matrices: np.ndarray
    middle: np.ndarray
    levels: tuple[PanelLevel, ...]
    frames: tuple[np.ndarray, ...]
    motions: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class GeometryUncertainty:
    """Standard uncertainties (mm; radians for tilts) of the whole by name, and their correlation to the mean cell.

    Attributes
    ----------
    sigma, cell_correlation : dict
        By :data:`GLOBAL_NAMES`.
    relative_cell_sigma : float
        Of the mean cell length.
    nodes : tuple of (n_nodes, 6) float64
        Standard uncertainties of the nodes, level by level; below the whole those of the motion against the other nodes
        below the same node, without the motion that these have in common.
    correlation : (p, p) float64
        Of all parameters that were refined: those of the whole, then the six of each node of each level.
    """

    sigma: dict[str, float]
    cell_correlation: dict[str, float]
    relative_cell_sigma: float
    nodes: tuple[np.ndarray, ...] = ()
    correlation: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True)
class RefinementStep:
    """Spots with weight, and the weighted rmsds of x and y (mm) and delta psi (radians) before a step."""

    n_spots: int
    rmsd: tuple[float, float, float]


@dataclass(frozen=True)
class RefinedDetector:
    """Outcome of a joint refinement.

    Attributes
    ----------
    geometry : JointGeometry
    residual : (n, 3) float64
        Observed less calculated, of the spots of this party.
    weight : (n,) float64
    steps : tuple of RefinementStep
        Over all parties.
    uncertainty : GeometryUncertainty
    converged : bool
        Whether the last step was smaller than a hundredth of every uncertainty.
    spots_by_panel : (n_panels,) int64
        Spots with weight, over all parties.
    """

    geometry: JointGeometry
    residual: np.ndarray
    weight: np.ndarray
    steps: tuple[RefinementStep, ...]
    uncertainty: GeometryUncertainty
    converged: bool
    spots_by_panel: np.ndarray


def start_geometry(
    panels: np.ndarray,
    a_matrices: np.ndarray,
    middle: np.ndarray | None = None,
    below: Sequence[tuple[PanelLevel, np.ndarray]] = (),
) -> JointGeometry:
    """The geometry before any motion of the detector.

    Parameters
    ----------
    panels, a_matrices, middle
        As in :class:`JointGeometry`; without `middle` nodes turn about the mean of the origins.
    below
        Levels below the whole that are refined as well, with the frames of their nodes.
    """
    middle = np.zeros((len(panels), 2)) if middle is None else middle
    whole = PanelLevel(np.zeros(len(panels), dtype=np.int64), np.full(6, np.inf), np.zeros(6, bool))
    levels = (whole, *(level for level, _ in below))
    frames = (panels[:1].copy(), *(np.array(frame) for _, frame in below))
    return JointGeometry(panels, a_matrices, middle, levels, frames, tuple(np.zeros((lv.n_nodes, 6)) for lv in levels))


def refine_detector(
    spots: DetectorSpots,
    start: JointGeometry,
    strains: np.ndarray,
    s0: np.ndarray,
    max_steps: int = 60,
    reducer: Reducer | None = None,
    given: GivenWeights | None = None,
) -> RefinedDetector:
    """Fit the detector and all crystals to the spots. Collective over the parties of `reducer`.

    Parameters
    ----------
    spots
        At least a few hundred over all parties. Crystals whose numbers agree when divided by :data:`BLOCK` are held by
        one party; a party may hold none.
    start
        Close enough for the Miller indices to be right; the same panels everywhere, the crystals of this party.
    strains : (K, m, 3, 3) float64
        Strains in the laboratory frame that the symmetry of each crystal allows (m = 0: cells are held).
    s0 : (3,) float64
        Incident beam, 1/angstrom.
    max_steps : int
        A step that moves the detector by less than a hundredth of its uncertainty is the last.
    given
        Weights instead of Tukey's.
    """
    fit = _JointFit(spots, strains, s0, reducer or Alone(), True, given)
    return _refined(fit, start, max_steps)


def refine_crystals(
    spots: DetectorSpots,
    start: JointGeometry,
    strains: np.ndarray,
    s0: np.ndarray,
    max_steps: int = 60,
    reducer: Reducer | None = None,
) -> RefinedDetector:
    """Fit the crystals alone, on the detector as it is; otherwise as :func:`refine_detector`."""
    return _refined(_JointFit(spots, strains, s0, reducer or Alone(), False), start, max_steps)


def crystal_shifts(
    spots: DetectorSpots, geometry: JointGeometry, strains: np.ndarray, s0: np.ndarray, reducer: Reducer | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What each crystal says of a shift of the whole detector, with its own parameters eliminated. Collective.

    Returns
    -------
    information : (K, 3, 3) float64
        Of shifts along the fast and slow axes and the normal, mm^-2; the widths of the spots are those of all crystals.
    score : (K, 3) float64
        Information times the shift, mm^-1.
    """
    whole = replace(geometry, levels=geometry.levels[:1], frames=geometry.frames[:1], motions=geometry.motions[:1])
    fit = _JointFit(spots, strains, s0, reducer or Alone(), True)
    residual, columns, jacobian_c = fit.derivatives(whole, strains)
    weight, scale = fit.weights(residual)
    root = np.sqrt(weight)[:, None] * scale
    # the shift does not act on delta psi, the crystal does
    g = np.zeros((len(residual), 3, 3))
    g[:, :2] = columns[:, :, :3]
    every = np.concatenate([g, jacobian_c], axis=2) * root[:, :, None]
    size = every.shape[2]
    terms = np.concatenate(
        [np.einsum("nia,nib->nab", every, every), np.einsum("nia,ni->na", every, residual * root)[:, :, None]], axis=2
    )
    sums = np.zeros((len(strains), size, size + 1))
    np.add.at(sums, spots.crystal, terms)
    cross, own = sums[:, :3, 3:size], sums[:, 3:, 3:size]
    eliminated = cross @ np.linalg.pinv(own, rcond=1e-10, hermitian=True)
    information = sums[:, :3, :3] - eliminated @ cross.transpose(0, 2, 1)
    score = sums[:, :3, size] - _times(eliminated, sums[:, 3:, size])
    return information, score


def spots_without_shifts(
    spots: DetectorSpots, geometry: JointGeometry, strains: np.ndarray, s0: np.ndarray, shift: np.ndarray
) -> DetectorSpots:
    """The spots where the detector would have seen them, had it not stood off by `shift` (K, 3) mm for each crystal."""
    whole = replace(geometry, levels=geometry.levels[:1], frames=geometry.frames[:1], motions=geometry.motions[:1])
    _, columns, _ = _JointFit(spots, strains, s0, Alone(), True).derivatives(whole, strains)
    return replace(spots, xy=spots.xy - _times(columns[:, :, :3], shift[spots.crystal]))


def geometry_uncertainty(
    spots: DetectorSpots, geometry: JointGeometry, strains: np.ndarray, s0: np.ndarray
) -> GeometryUncertainty:
    """The uncertainty of a geometry that was refined elsewhere; parameters as in :func:`refine_detector`."""
    fit = _JointFit(spots, strains, s0, Alone(), True)
    residual, columns, jacobian_c = fit.derivatives(geometry, strains)
    weight, scale = fit.weights(residual)
    return fit.uncertainty(fit.solve(geometry, strains, residual, columns, jacobian_c, weight, scale), geometry)


def _refined(fit: _JointFit, geometry: JointGeometry, max_steps: int) -> RefinedDetector:
    strains, steps, converged = fit.strains, [], False
    for k in range(max_steps + 1):
        residual, columns, jacobian_c = fit.derivatives(geometry, strains)
        weight, scale = fit.weights(residual)
        steps.append(fit.step(residual, weight))
        solved = fit.solve(geometry, strains, residual, columns, jacobian_c, weight, scale)
        if converged or k == max_steps:
            break
        converged = bool(np.all(np.abs(solved.detector) < 0.01 * solved.sigma)) and fit.crystals_rest(solved)
        geometry, strains = _moved(geometry, strains, solved.by_level(geometry) if fit.move else [], solved.crystals)
        if fit.move and k < _WIDTHS_LEARNED:
            geometry = _with_learned_widths(geometry, solved)
    by_panel = np.bincount(fit.spots.panel[weight > 0], minlength=len(geometry.panels))
    return RefinedDetector(
        geometry,
        residual,
        weight,
        tuple(steps),
        fit.uncertainty(solved, geometry),
        converged,
        fit.reducer.sum(by_panel),
    )


# parameters of a node that share a width: shifts in the plane, shifts out of it, tilts out of it, turns in it
_ALIKE = ((0, 1), (2,), (3, 4), (5,))
# in so many steps, after which they are held
_WIDTHS_LEARNED = 8
# a hundredth of a parameter that the data determine says nothing of a width
_LEAST_DETERMINED = 0.01
# widths do not fall below a micrometre, nor a thousandth of a degree
_NARROWEST = np.repeat([1e-3, np.radians(1e-3)], 3)


def _with_learned_widths(geometry: JointGeometry, solved: _Solution) -> JointGeometry:
    """`geometry` with the widths of the priors that its motions speak for.

    The evidence for a width is largest where width^2 = sum theta^2 / sum (1 - var(theta) / width^2), in which the
    denominator is the number of motions that the data, rather than the prior, determine (MacKay, 1992, eq. 4.9).
    """
    variances = _by_level(np.diag(solved.covariance), solved.free, geometry)
    levels = []
    for level, motion, variance in zip(geometry.levels, geometry.motions, variances):
        if level.learned.any():
            determined = np.maximum(1 - variance / level.widths**2, 0.0).sum(axis=0)
            square = (motion**2).sum(axis=0)
            widths = np.empty(6)
            for alike in map(list, _ALIKE):
                widths[alike] = np.sqrt(square[alike].sum() / max(determined[alike].sum(), _LEAST_DETERMINED))
            level = replace(level, widths=np.where(level.learned, np.maximum(widths, _NARROWEST), level.widths))
        levels.append(level)
    return replace(geometry, levels=tuple(levels))


@dataclass(frozen=True)
class _Solution:
    """A step of the detector (p,) and of the crystals (K, 3 + m), with what the uncertainty needs.

    `cell_with_detector` (p,) is sum_k N_gk N_kk^-1 w and `cell` is sum_k w^T N_kk^-1 w; `free` (6 x nodes,) says which
    parameters of the detector the p are.
    """

    detector: np.ndarray
    crystals: np.ndarray
    covariance: np.ndarray
    inverse: np.ndarray
    cell_with_detector: np.ndarray
    cell: float
    free: np.ndarray

    @property
    def sigma(self) -> np.ndarray:
        return np.sqrt(np.maximum(np.diag(self.covariance), 0.0))

    def by_level(self, geometry: JointGeometry) -> list[np.ndarray]:
        """The step of each node, (n_nodes, 6) for each level."""
        return _by_level(self.detector, self.free, geometry)


def _by_level(values: np.ndarray, free: np.ndarray, geometry: JointGeometry) -> list[np.ndarray]:
    every = np.zeros(len(free))
    every[free] = values
    ends = np.cumsum([6 * level.n_nodes for level in geometry.levels])
    return [part.reshape(-1, 6) for part in np.split(every, ends[:-1])]


class _JointFit:
    """The normal equations of one set of spots.

    Parameters
    ----------
    move : bool
        Whether the detector moves, or the crystals alone.
    """

    def __init__(
        self, spots: DetectorSpots, strains: np.ndarray, s0: np.ndarray, reducer: Reducer, move: bool, given=None
    ):
        self.given = given
        self.spots = spots
        self.strains = strains
        self.s0 = s0
        self.reducer = reducer
        self.move = move
        self.starts = np.searchsorted(spots.crystal, np.arange(len(strains) + 1)).astype(np.int64)
        number = np.arange(len(strains)) if spots.number is None else spots.number
        edges = np.flatnonzero(np.diff(number // BLOCK, prepend=-1, append=-2) if len(number) else [])
        self.blocks = list(pairwise(edges.tolist()))
        self.n_total = int(reducer.sum(np.array([len(strains)]))[0])

    def derivatives(self, geometry: JointGeometry, strains: np.ndarray):
        """Residuals (n, 3), and derivatives: of positions by nodes, (n, 2, 6) a level, by crystals (n, 3, 3 + m)."""
        spots = self.spots
        q = _times(geometry.a_matrices[spots.crystal], spots.hkl)
        along = [q @ generator.T for generator in GENERATORS]
        along += [_times(strains[spots.crystal, k], q) for k in range(strains.shape[1])]
        inverse = np.linalg.inv(geometry.panels)[spots.panel]
        predicted, dxy, dpsi = prediction_gradients(q, np.array(along), inverse, self.s0)
        jacobian_c = np.concatenate([dxy.transpose(1, 2, 0), dpsi.T[:, None, :]], axis=1)
        residual = np.concatenate([spots.xy - predicted.xy, -predicted.delta_psi[:, None]], axis=1)
        if not self.move:
            return residual, np.empty((len(q), 2, 0)), np.ascontiguousarray(jacobian_c)
        centres = np.concatenate([_centres(geometry, level) for level in geometry.levels])
        axes = _axes(np.concatenate(geometry.frames), centres)
        node = self.place(geometry) // 6
        columns = np.empty((len(q), 2, 6 * len(geometry.levels)))
        _loops().columns(
            *(len(q), len(geometry.levels), np.ascontiguousarray(inverse), predicted.s1, predicted.xy),
            *(node, np.ascontiguousarray(axes), np.ascontiguousarray(centres), columns),
        )
        return residual, columns, np.ascontiguousarray(jacobian_c)

    def place(self, geometry: JointGeometry) -> np.ndarray:
        """First parameter of the node of each spot in each level, (n, levels) int64."""
        first = np.cumsum([0, *(6 * level.n_nodes for level in geometry.levels)])
        panel = self.spots.panel
        return np.stack([first[k] + 6 * level.node[panel] for k, level in enumerate(geometry.levels)], axis=1)

    def weights(self, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tukey's weight of each spot, (n,), and 1 / width of x, y and delta psi, (3,). Collective."""
        if self.given is not None:
            return self.given.spot, 1 / self.given.width
        distance = np.hypot(residual[:, 0], residual[:, 1])
        middle = exact_median(self.reducer, np.stack([distance, np.abs(residual[:, 2])], axis=1))
        xy, psi = max(float(middle[0]) / _MEDIAN_2, 1e-9), max(float(middle[1]) / _MEDIAN_1, 1e-12)
        # a spot counts as one observation: it is an outlier when either its place or its delta psi is
        off = np.maximum(distance / (xy * _TUKEY_XY), np.abs(residual[:, 2]) / (psi * _TUKEY_PSI))
        return np.maximum(0.0, 1 - off**2) ** 2, 1 / np.array([xy, xy, psi])

    def step(self, residual: np.ndarray, weight: np.ndarray) -> RefinementStep:
        """What is known before a step. Collective."""
        count = self.reducer.sum(np.array([np.count_nonzero(weight)]))[0]
        sums = exact_sums(self.reducer, np.concatenate([weight[:, None] * residual**2, weight[:, None]], axis=1))
        rmsd = np.sqrt(sums[:3] / max(sums[3], 1e-300))
        return RefinementStep(int(count), tuple(rmsd.tolist()))

    def solve(self, geometry: JointGeometry, strains, residual, columns, jacobian_c, weight, scale) -> _Solution:
        """The step of all parameters. Collective."""
        root = np.ascontiguousarray(np.sqrt(weight)[:, None] * scale)
        n_crystals, p = len(strains), jacobian_c.shape[2]
        normal, right = np.empty((n_crystals, p, p)), np.empty((n_crystals, p))
        _loops().crystals(n_crystals, self.starts, p, jacobian_c, residual, root, normal, right)
        # a crystal with few spots may leave a strain open: the pseudo-inverse leaves that one as it is
        values, vectors = np.linalg.eigh(normal)
        open_ = values <= 1e-10 * values.max(axis=1, initial=1e-300, keepdims=True)
        stretched = np.where(open_, 0.0, np.maximum(values, 1e-300) ** -0.5)
        root_inverse = np.ascontiguousarray(stretched[:, :, None] * vectors.transpose(0, 2, 1))
        inverse = root_inverse.transpose(0, 2, 1) @ root_inverse
        # a strain that lengthens reciprocal vectors shortens the cell
        lengths = np.concatenate([np.zeros((len(strains), 3)), -np.trace(strains, axis1=2, axis2=3) / 3], axis=1)
        longer = _times(inverse, lengths)
        own = float(exact_sums(self.reducer, (lengths * longer).sum(axis=1)))
        if not self.move:
            nothing = np.zeros(0)
            crystals = _times(inverse, right)
            return _Solution(nothing, crystals, np.zeros((0, 0)), inverse, nothing, own, nothing > 0)
        prior = np.concatenate([np.tile(level.widths, level.n_nodes) for level in geometry.levels])
        motion = np.concatenate([m.ravel() for m in geometry.motions])
        free = prior > 0
        free[5] = False
        whole, rest, u = self._reduced(geometry, columns, jacobian_c, residual, root, root_inverse, right, longer, free)
        stiffness = prior[free] ** -2.0
        whole[np.diag_indices_from(whole)] += stiffness
        rest -= stiffness * motion[free]
        # mm and radians differ by orders of magnitude
        size = np.sqrt(np.maximum(np.diag(whole), 1e-300))
        covariance = _inverse(whole / np.outer(size, size)) / np.outer(size, size)
        detector = _times(covariance, rest)
        # the spots move with the detector; the crystals follow
        moved = np.zeros((len(residual), 3))
        moved[:, :2] = _times(columns, self._of_spots(detector, free, geometry))
        follow = np.empty((n_crystals, p))
        _loops().crystals(n_crystals, self.starts, p, jacobian_c, moved, root, normal, follow)
        crystals = _times(inverse, right - follow)
        return _Solution(detector, crystals, covariance, inverse, u, own, free)

    def _of_spots(self, values: np.ndarray, free: np.ndarray, geometry: JointGeometry) -> np.ndarray:
        """Values of the free parameters that act on each spot, (n, 6 x levels)."""
        panel = self.spots.panel
        parts = _by_level(values, free, geometry)
        return np.concatenate([part[level.node[panel]] for part, level in zip(parts, geometry.levels)], axis=1)

    def _reduced(self, geometry: JointGeometry, columns, jacobian_c, residual, root, root_inverse, right, longer, free):
        """The reduced matrix (p, p) and right-hand side (p,), and sum N_gk N_kk^-1 w, over all parties. Collective."""
        n_levels, size, p = len(geometry.levels), len(free), jacobian_c.shape[2]
        place = self.place(geometry)
        blocks = self.blocks
        # no sum of the reduced matrix exceeds the one without the crystals, whose diagonal bounds all of it
        squares = np.zeros((len(blocks), size))
        index = (place[:, :, None] + np.arange(6)).reshape(len(place), 6 * n_levels)
        for k, (begin, end) in enumerate(blocks):
            own = slice(self.starts[begin], self.starts[end])
            terms = ((columns[own] * root[own, :2, None]) ** 2).sum(axis=1)
            squares[k] = np.bincount(index[own].ravel(), terms.ravel(), size)
        bound = np.sqrt(exact_sums(self.reducer, squares))
        total = GridSum(np.outer(bound, bound))
        sides, along = np.zeros((len(blocks), size)), np.zeros((len(blocks), size))
        slot, found = np.full(size // 6, -1), np.empty(size // 6, dtype=np.int64)
        cross, half = np.empty(p * size), np.empty(p * size)
        reduced = _times(root_inverse, right)
        for k, (begin, end) in enumerate(blocks):
            full = np.zeros((size, size))
            _loops().reduced(
                *(begin, end, self.starts, n_levels, p, size),
                *(columns, jacobian_c, residual, root, place, root_inverse, reduced, longer),
                *(full, sides[k], along[k], slot, found, cross, half),
            )
            total.add(full)
        whole = total.over(self.reducer)[np.ix_(free, free)]
        whole = np.triu(whole) + np.triu(whole, 1).T
        return whole, exact_sums(self.reducer, sides)[free], exact_sums(self.reducer, along)[free]

    def crystals_rest(self, solved: _Solution) -> bool:
        """Whether the crystals, too, move by less than a hundredth of their uncertainty. Collective."""
        if self.move:
            return True
        sigma = np.sqrt(np.maximum(np.einsum("kcc->kc", solved.inverse), 0.0))
        return float(self.reducer.max(np.array([np.max(np.abs(solved.crystals) - 0.01 * sigma, initial=0.0)]))[0]) <= 0

    def uncertainty(self, solved: _Solution, geometry: JointGeometry) -> GeometryUncertainty:
        """Of all parameters of the detector, and of the mean cell length."""
        own, u = solved.cell / self.n_total**2, solved.cell_with_detector / self.n_total
        if not self.move:
            return GeometryUncertainty({}, {}, float(np.sqrt(max(own, 1e-300))))
        sigma_cell = float(np.sqrt(max(own + float((u * _times(solved.covariance, u)).sum()), 1e-300)))
        sigma = np.maximum(solved.sigma, 1e-300)
        correlation = -_times(solved.covariance, u) / (sigma * sigma_cell)
        return GeometryUncertainty(
            dict(zip(GLOBAL_NAMES, sigma[:5].tolist())),
            dict(zip(GLOBAL_NAMES, correlation[:5].tolist())),
            sigma_cell,
            (_by_level(sigma, solved.free, geometry)[0], *_sigma_within(geometry, solved)),
            solved.covariance / np.outer(sigma, sigma),
        )


def _times(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Each matrix (..., i, j) times its vector (..., j), with the same last digits wherever the arrays lie in memory.

    BLAS adds up a product with a vector in an order that depends on the alignment of the matrix, which changes with
    the number of matrices before it; its products of two matrices do not.
    """
    return (matrices * vectors[..., None, :]).sum(axis=-1)


class _Loops(NamedTuple):
    columns: Any
    crystals: Any
    reduced: Any


@cache
def _loops() -> _Loops:
    read, write = array(np.float64), array(np.float64, writeable=True)
    whole, whole_out = array(np.int64), array(np.int64, writeable=True)
    return _Loops(
        declare("ssx_detector_columns", [c_int64, c_int, *3 * [read], whole, read, read, write]),
        declare("ssx_crystal_normals", [c_int64, whole, c_int, *3 * [read], write, write]),
        declare(
            "ssx_reduced_normals",
            [
                *(c_int64, c_int64, whole, c_int, c_int, c_int64, *4 * [read], whole, *3 * [read]),
                *(*3 * [write], whole_out, whole_out, write, write),
            ],
        ),
    )


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverse of a symmetric matrix with ones on its diagonal; what it leaves open is left as it is."""
    try:
        root = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)
    if np.diag(root).min() < 1e-6:
        return np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)
    inverse = np.linalg.inv(matrix)
    return 0.5 * (inverse + inverse.T)


def _sigma_within(geometry: JointGeometry, solved: _Solution) -> list[np.ndarray]:
    """Uncertainties (n_nodes, 6) of each level below the whole, without what moves all nodes below one node together.

    With R the derivatives of the motions of these nodes by a common motion, that is what the projection onto the rest,
    I - R (R^T R)^-1 R^T, leaves of the covariance; turns count by the way that they move the edge of a node.
    """
    result = []
    size = len(solved.free)
    covariance = np.zeros((size, size))
    covariance[np.ix_(solved.free, solved.free)] = solved.covariance
    at = 6 * geometry.levels[0].n_nodes
    for above, level, frames in zip(geometry.levels, geometry.levels[1:], geometry.frames[1:]):
        centres = _centres(geometry, level)
        axes = _axes(frames, centres)
        of = np.empty(level.n_nodes, dtype=np.int64)
        of[level.node] = above.node
        reach = max(float(np.linalg.norm(geometry.middle, axis=1).mean()), 1.0)
        sigma = np.empty((level.n_nodes, 6))
        for parent in np.unique(of):
            nodes = np.flatnonzero(of == parent)
            arm = centres[nodes] - centres[nodes].mean(axis=0)
            common = np.zeros((len(nodes), 6, 6))
            common[:, :3, :3] = axes[nodes].transpose(0, 2, 1)
            # a turn w moves a centre by w x arm
            turned = np.cross(np.eye(3)[None], arm[:, None, :])
            common[:, :3, 3:] = np.einsum("nji,nkj->nik", axes[nodes], turned) / reach
            common[:, 3:, 3:] = axes[nodes].transpose(0, 2, 1)
            span = np.linalg.qr(common.reshape(-1, 6))[0]
            rest = np.eye(6 * len(nodes)) - span @ span.T
            scale = np.tile(np.repeat([1.0, reach], 3), len(nodes))
            index = (at + 6 * nodes[:, None] + np.arange(6)).ravel()
            own = rest @ (covariance[np.ix_(index, index)] * np.outer(scale, scale)) @ rest
            sigma[nodes] = (np.sqrt(np.maximum(np.diag(own), 0.0)) / scale).reshape(-1, 6)
        result.append(sigma)
        at += 6 * level.n_nodes
    return result


def _axes(frames: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Fast, slow and normal of each frame (n, 3, 3) as columns; the normal points away from the crystal.

    Which way that is follows from the centre of the panels (n, 3): the origin of a frame may lie at the crystal.
    """
    fast, slow = frames[:, :, 0], frames[:, :, 1]
    normal = np.cross(fast, slow)
    away = np.where((centres * normal).sum(axis=1) > 0, 1.0, -1.0)
    return np.stack([fast, slow, normal * away[:, None]], axis=2)


def _centres(geometry: JointGeometry, level: PanelLevel) -> np.ndarray:
    """Mean of the middles of the panels of each node, (n_nodes, 3)."""
    middles = geometry.panels[:, :, 2] + np.einsum("pij,pj->pi", geometry.panels[:, :, :2], geometry.middle)
    total = np.zeros((level.n_nodes, 3))
    np.add.at(total, level.node, middles)
    return total / np.bincount(level.node)[:, None]


def _moved(geometry: JointGeometry, strains: np.ndarray, detector: list[np.ndarray], crystals: np.ndarray):
    """The geometry after a step, and the strains turned with the crystals."""
    if len(detector):
        geometry = move_nodes(geometry, detector)
    turns = rotation_matrices(crystals[:, :3])
    stretch = np.eye(3) + (crystals[:, 3:, None, None] * strains).sum(axis=1)
    geometry = replace(geometry, a_matrices=turns @ stretch @ geometry.a_matrices)
    return geometry, turns[:, None] @ strains @ turns[:, None].transpose(0, 1, 3, 2)


def move_nodes(geometry: JointGeometry, motions: Sequence[np.ndarray]) -> JointGeometry:
    """`geometry` with each node of each level moved, (n_nodes, 6) a level, from the whole down."""
    for depth, (level, motion) in enumerate(zip(geometry.levels, motions)):
        centre = _centres(geometry, level)
        axes = _axes(geometry.frames[depth], centre)
        rotation = rotation_matrices(np.einsum("nij,nj->ni", axes, motion[:, 3:]))
        shift = centre - np.einsum("nij,nj->ni", rotation, centre) + np.einsum("nij,nj->ni", axes, motion[:, :3])
        frames = list(geometry.frames)
        for below in range(depth, len(geometry.levels)):
            # any panel of a node tells which node it belongs to further up
            lower = geometry.levels[below]
            of = np.empty(lower.n_nodes, dtype=np.int64)
            of[lower.node] = level.node
            frames[below] = _turned(frames[below], rotation[of], shift[of])
        panels = _turned(geometry.panels, rotation[level.node], shift[level.node])
        geometry = replace(geometry, panels=panels, frames=tuple(frames))
    total = tuple(old + new for old, new in zip(geometry.motions, motions))
    return replace(geometry, motions=total)


def _turned(frames: np.ndarray, rotation: np.ndarray, shift: np.ndarray) -> np.ndarray:
    moved = rotation @ frames
    moved[:, :, 2] += shift
    return moved
