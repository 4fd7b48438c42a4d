"""Indexing of one still by the fast kernels: what ``dials.ssx_index`` does for an image, with the same parameters.

A lattice is searched for in the spots that the lattices found so far leave. As in the stills indexer of DIALS, the
first bases that the vectors of a search make are refined without symmetry, the one of the smallest rmsd says which
spots are the lattice's and what their indices are, and all lattices are refined together with their symmetry. Each
refinement goes in three rounds: positional outliers rejected after the first, then also the spots whose delta psi lies
outside the reflecting zone of the mosaic model. Where the searches of DIALS give no lattice, there is one more, which
finds the known cell in fewer spots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from cctbx import sgtbx
from dials.algorithms.indexing import DialsIndexError
from dials.algorithms.indexing.max_cell import find_max_cell
from dials.algorithms.indexing.symmetry import SymmetryHandler
from dials.array_family import flex
from dxtbx.model import Crystal, Experiment, ExperimentList, MosaicCrystalSauter2014
from libtbx import Auto

from ssx_mpi import dials_compat
from ssx_mpi.kernels import fourier_search, lattice_refinement, lattice_search, lattices, mosaicity
from ssx_mpi.kernels.lattice_refinement import CellModel, Lattice, Spots
from ssx_mpi.stages.fast.indexed_tables import (
    indexed_table,
    lattice_identifier,
    spot_arrays,
    still_imageset,
    strong_spots,
)
from ssx_mpi.stages.fast.target import FoundLattice, Target
from ssx_mpi.stages.still_results import Crystals

logger = logging.getLogger(__name__)

# searches of DIALS for lattice vectors that are done here
_METHODS = ("fft1d", "real_space_grid_search")
# values of parameters that are covered
_COVERED: dict[str, tuple] = {
    "indexing.known_symmetry.A_matrix": (None,),
    "indexing.basis_vector_combinations.max_combinations": (None,),
    "indexing.optimise_initial_basis_vectors": (False,),
    "indexing.index_assignment.method": ("simple",),
    "indexing.stills.refine_all_candidates": (True,),
    "indexing.refinement_protocol.mode": ("refine_shells",),
    "indexing.check_misindexing.grid_search_scope": (0,),
    "refinement.parameterisation.crystal.fix": (None,),
    "refinement.parameterisation.spherical_relp_model": (False,),
    "refinement.reflections.weighting_strategy.override": ("stills", None, Auto),
}
# without real_space_grid_search.max_vectors; directions 5 degrees apart are fewer
_EVERY_VECTOR = 10_000
# candidates of the search for the known cell that are refined; it has ranked them by what they explain
_MAX_REFINED = 2
_WORTH_REFINING = 0.7
# what DIALS takes for basis_vector_combinations.max_refine=Auto of stills
_MAX_REFINED_BY_DIALS = 5
# a lattice is accepted when fewer than 10 to this power as good are expected by chance: noise gives 0 to 12, the
# weakest true lattices of nitrite reductase -28
_MAX_CHANCE = -6.0
# standard deviations by which a candidate must explain more spots than chance to be refined: the best candidates in
# spots without order reach 3 to 5, the weakest true lattices of nitrite reductase 7 to 9
_BEYOND_CHANCE = 4.0
# settings of a lattice whose qualities differ by less are equally good
_AS_GOOD = 0.999
# of unknown cells the smallest that explains this share of the most spots
_NEARLY_AS_MANY = 0.8
# angstrom: the distance of neighbouring spots tells the longest axis, but on a still of 70 spots it told 52 for 96
_LONG_CELL = 150.0
# what the Fourier search of DIALS asks for
_MIN_SPOTS = 8


@dataclass(frozen=True)
class Settings:
    """Parameters of the indexing of one still, in the words of ``dials.ssx_index``."""

    min_spots: int
    max_lattices: int | None
    minimum_angular_separation: float
    recycle_cutoff: float
    hkl_tolerance: float
    d_min: float | None
    length_tolerance: float
    angle_tolerance: float
    max_rmsd_px: float
    proximity_d_min: float
    max_proximal_volume: float
    max_volume_change: float | None
    reject_outliers: bool
    delta_psi_weight: float
    domain_size: float | None
    half_mosaicity: float | None
    min_cell: float
    min_volume: float
    methods: tuple[str, ...]
    max_cell_multiplier: float
    fft_grid: float | None
    direction_grid: float
    max_vectors: int
    max_refined: int
    max_delta: float
    candidates_with_symmetry: bool


@dataclass(frozen=True)
class Candidate:
    """A lattice that may be taken: `indexing` gave its spots their indices, `fit` was refined with them."""

    indexing: Lattice
    fit: FoundLattice


class _NoFit(Exception):
    """A candidate that cannot be refined or that the criteria reject."""


class FastIndexer:
    """Index stills with one set of parameters, which are read and prepared once.

    Parameters
    ----------
    params : libtbx.phil.scope_extract
        The extracted scope of ``dials.command_line.ssx_index``; it is not altered.

    Raises
    ------
    ValueError
        When :meth:`supports` says no.
    """

    def __init__(self, params: Any):
        possible, reason = self.supports(params)
        if not possible:
            raise ValueError(reason)
        self.settings = read_settings(params)
        self._max_cell = None if params.indexing.max_cell is Auto else params.indexing.max_cell
        known = params.indexing.known_symmetry
        self._space_group = known.space_group.group() if known.space_group is not None else sgtbx.space_group("P 1")
        self._target = None if known.unit_cell is None else Target.from_cell(known.unit_cell, self._space_group)
        self._max_delta = known.max_delta

    @staticmethod
    def supports(params: Any) -> tuple[bool, str]:
        """Whether these parameters of ``dials.ssx_index`` are covered, and what is not."""
        parameterisation = params.refinement.parameterisation
        cells = parameterisation.crystal.unit_cell.restraints.tie_to_target
        isoforms = dials_compat.parameter(params, "indexing.stills.isoforms", [])
        special = {
            f"method={params.method}": not set(params.method) & set(_METHODS),
            "stills.indexer=sequences": params.indexing.stills.indexer == "sequences",
            "stills.isoforms": any(isoform.name is not None for isoform in isoforms),
            "refinement of the beam": "all" not in (parameterisation.beam.fix or ()),
            "refinement of the detector": "all" not in (parameterisation.detector.fix or ()),
            "restraints of the cell": any(restraint.values is not None for restraint in cells),
        }
        left = dials_compat.uncovered(params, _COVERED) + [name for name, present in special.items() if present]
        return not left, ", ".join(left)

    def index(self, experiment: Experiment, strong: flex.reflection_table) -> Crystals:
        """Lattices of one still and their spots.

        Parameters
        ----------
        experiment : Experiment
            Beam, detector and image set of the still.
        strong : flex.reflection_table
            Its strong spots, as found; the table is not altered.

        Returns
        -------
        experiments : ExperimentList
            One experiment for each lattice, best first; empty when there is none.
        reflections : flex.reflection_table
            The indexed spots, ``id`` being the number of the experiment.
        """
        if len(strong) < self.settings.min_spots:
            return Crystals(ExperimentList(), flex.reflection_table())
        table = strong_spots(experiment, strong)
        if len(table) < self.settings.min_spots:
            return Crystals(ExperimentList(), flex.reflection_table())
        pixel_size = experiment.detector[0].get_pixel_size()[0]
        target, max_cell = self._target, self._max_cell
        spots = spot_arrays(experiment, table)
        if target is None:
            max_cell = _longest_cell(table) if max_cell is None else max_cell
            target = None if max_cell is None else self.discover(spots, pixel_size, max_cell)
            if target is None:
                return Crystals(ExperimentList(), flex.reflection_table())
        found = self.find(spots, pixel_size, target)
        return self._as_dials(experiment, table, found)

    def discover(self, spots: Spots, pixel_size: float, max_cell: float) -> Target | None:
        """The cell of a still of unknown cell, in the setting of the space group; None when there is none.

        Of the cells that explain nearly as many spots as any, the smallest that the space group allows is taken: the
        others are its multiples.
        """
        bases, _ = lattice_search.search_unknown(spots.q, self.settings.min_cell, max_cell, self.settings.min_volume)
        fits = []
        for basis in bases:
            model = CellModel(basis, lattice_refinement.invariant_strains(np.eye(3)[None]), np.eye(3))
            target = Target(model, lattices.known_lattice(basis), np.eye(3), [np.eye(3)], np.eye(3)[None])
            try:
                fit = self._refine_alone(spots, Lattice(np.eye(3), basis), pixel_size, target)
            except _NoFit as reason:
                logger.debug("cell rejected: %s", reason)
                continue
            if fit.rmsd_px > self.settings.max_rmsd_px or self._chance(spots, fit, len(spots), target) > _MAX_CHANCE:
                continue
            fits.append(fit)
        enough = _NEARLY_AS_MANY * max((len(f.spots) for f in fits), default=0)
        fits.sort(key=lambda f: (len(f.spots) < enough, abs(np.linalg.det(f.lattice.basis))))
        # the metric symmetry of a cell takes longer to find than the cell
        symmetric = (self._with_symmetry(f.lattice) for f in fits)
        crystal = next((c for c in symmetric if c is not None), None)
        return None if crystal is None else Target.from_cell(crystal.get_unit_cell(), self._space_group)

    def _with_symmetry(self, lattice: Lattice) -> Crystal | None:
        crystal = _crystal(lattices.reduce_basis(lattice.direct), sgtbx.space_group("P 1"))
        if self._space_group.type().number() == 1:
            return crystal
        handler = SymmetryHandler(space_group=self._space_group, max_delta=self._max_delta)
        symmetric, change = handler.apply_symmetry(crystal)
        return None if symmetric is None else symmetric.change_basis(change)

    def find(self, spots: Spots, pixel_size: float, target: Target | None = None) -> list[FoundLattice]:
        """Lattices of one cell in the spots of one still, as arrays; `pixel_size` in mm."""
        settings = self.settings
        target = self._target if target is None else target
        if target is None:
            raise ValueError("no cell is known: discover it first")
        spacing = 1 / np.linalg.norm(spots.q, axis=1)
        usable = np.ones(len(spots), dtype=bool) if settings.d_min is None else spacing > settings.d_min
        found: list[FoundLattice] = []
        owner = np.full(len(spots), -1)
        while settings.max_lattices is None or len(found) < settings.max_lattices:
            if found and not self._worth_another(found, owner, spacing):
                break
            free = np.nonzero((owner < 0) & usable)[0]
            candidate = self._best_candidate(spots.select(free), pixel_size, found, target)
            if candidate is None:
                break
            lattices = [f.lattice for f in found]
            owner, h = self._assign(spots, usable, [*lattices, candidate.indexing], target)
            if not found:
                found = [replace(candidate.fit, spots=free[candidate.fit.spots])]
                continue
            lattices.append(candidate.fit.lattice)
            try:
                together = self._refine_together(spots, owner, h, lattices, pixel_size, target)
            except _NoFit as reason:
                logger.debug("lattice %d dropped: %s", len(lattices), reason)
                break
            if self._chance(spots, together[-1], len(free), target) > _MAX_CHANCE:
                logger.debug("lattice %d dropped: what is left of it may agree by chance", len(lattices))
                break
            found = together
        return [self._balanced(spots, f, pixel_size, target) for f in found]

    def _balanced(self, spots: Spots, found: FoundLattice, pixel_size: float, target: Target) -> FoundLattice:
        """The lattice refined once more with its own spots, delta psi and positions weighted as they scatter."""
        own, strains = spots.select(found.spots), target.model.strains
        weight = lattice_refinement.balanced_weight(own, found.h, found.lattice, 3 + len(strains))
        try:
            fit = lattice_refinement.refine_lattice(own, found.h, found.lattice, strains, weight).lattice
            mosaic = _mosaicity(own, found.h, fit)
        except (ValueError, np.linalg.LinAlgError) as error:
            logger.debug("lattice left as it was: %s", error)
            return found
        return replace(found, lattice=fit, mosaic=mosaic, rmsd_px=_rmsd(own, found.h, fit) / pixel_size)

    def _worth_another(self, found: list[FoundLattice], owner: np.ndarray, spacing: np.ndarray) -> bool:
        finest = spacing[np.concatenate([f.spots for f in found])].min()
        inside = spacing > finest
        return np.count_nonzero(owner[inside] < 0) >= self.settings.recycle_cutoff * np.count_nonzero(inside)

    def _best_candidate(
        self, spots: Spots, pixel_size: float, found: list[FoundLattice], target: Target
    ) -> Candidate | None:
        if len(spots) < _MIN_SPOTS:
            return None
        # of the bases that DIALS would refine the one of the smallest rmsd; the others are of different lattices
        searches: list[tuple[Callable, Callable]] = [
            *((partial(self._bases_of_dials, method), _smallest_rmsd) for method in self.settings.methods),
            (self._bases_by_known_vectors, _quality),
        ]
        for search, worth in searches:
            fits = []
            for basis in search(spots, target, found):
                try:
                    fits.append(self._refine_candidate(spots, basis, pixel_size, target))
                except _NoFit as reason:
                    logger.debug("candidate rejected: %s", reason)
            for fit in sorted(fits, key=worth, reverse=True):
                try:
                    best = self._with_its_symmetry(spots, fit, pixel_size, target)
                except _NoFit as reason:
                    logger.debug("candidate rejected: %s", reason)
                    continue
                if self._chance(spots, best.fit, len(spots), target) <= _MAX_CHANCE:
                    return best
                logger.debug("candidate rejected: its %d spots may agree by chance", len(best.fit.spots))
        return None

    def _bases_of_dials(self, method: str, spots: Spots, target: Target, found: list[FoundLattice]) -> list[np.ndarray]:
        """The first bases, those that DIALS would refine."""
        settings = self.settings
        if method == "fft1d":
            max_cell = self._max_cell or settings.max_cell_multiplier * target.lengths.max()
            vectors = fourier_search.lattice_vectors(spots.q, max_cell, settings.fft_grid)
        else:
            vectors = fourier_search.vectors_of_known_lengths(
                spots.q, target.lengths, settings.direction_grid, settings.max_vectors
            )
        criterion = lattices.CellCriterion.of(
            target.known,
            target.operations,
            np.linalg.inv(target.to_reduced),
            settings.length_tolerance,
            settings.angle_tolerance,
            settings.max_delta,
        )
        bases = fourier_search.known_bases(vectors, target.known, criterion)
        return list(islice((b for b in bases if not self._is_near(b, found, target)), settings.max_refined))

    def _bases_by_known_vectors(self, spots: Spots, target: Target, found: list[FoundLattice]) -> list[np.ndarray]:
        """Bases that explain many spots, no two of them alike."""
        bases, score = lattice_search.search_known(
            spots.q, target.known, self.settings.length_tolerance, self.settings.angle_tolerance
        )
        bases = bases[score >= _WORTH_REFINING * score.max(initial=0.0)][:_MAX_REFINED]
        return [b for b in bases if not self._is_near(b, found, target)]

    def _is_near(self, basis: np.ndarray, found: list[FoundLattice], target: Target) -> bool:
        back = np.linalg.inv(target.to_reduced)
        limit = self.settings.minimum_angular_separation
        return any(
            _misorientation(
                lattice_refinement.nearest_lattice(back @ variant @ basis, target.model),
                other.lattice,
                target.known.rotations,
            )
            < limit
            for other in found
            for variant in target.variants
        )

    def _refine_candidate(self, spots: Spots, basis: np.ndarray, pixel_size: float, target: Target) -> FoundLattice:
        """The fit near a reduced basis, without symmetry unless it is asked for."""
        direct = np.linalg.inv(target.to_reduced) @ basis
        if self.settings.candidates_with_symmetry:
            start = lattice_refinement.nearest_lattice(direct, target.model)
            fit = self._refine_alone(spots, start, pixel_size, target)
        else:
            fit = self._refine_alone(spots, Lattice(np.eye(3), direct), pixel_size, target.triclinic(direct))
        if fit.rmsd_px > self.settings.max_rmsd_px:
            raise _NoFit(f"rmsd of {fit.rmsd_px:.2f} px")
        return fit

    def _with_its_symmetry(self, spots: Spots, fit: FoundLattice, pixel_size: float, target: Target) -> Candidate:
        """The lattice whose spots and indices follow from a fit without symmetry, refined with it."""
        back = np.linalg.inv(target.to_reduced)
        reduced = target.to_reduced @ fit.lattice.direct
        every = np.ones(len(spots), dtype=bool)
        candidates = []
        for variant in target.variants:
            direct = back @ variant @ reduced
            indexing = Lattice(np.eye(3), direct)
            owner, h = self._assign(spots, every, [indexing], target)
            start = lattice_refinement.nearest_lattice(direct, target.model)
            try:
                symmetric = self._refine_together(spots, owner, h, [start], pixel_size, target)[0]
            except _NoFit as reason:
                logger.debug("setting rejected: %s", reason)
                continue
            candidates.append(Candidate(indexing, symmetric))
        if not candidates:
            raise _NoFit("no setting of the symmetry fits")
        # settings that the cell is free to go between fit alike, and rounding must not choose: the given cell does
        enough = _AS_GOOD * max(_quality(c.fit) for c in candidates)
        known = np.linalg.norm(target.model.basis, axis=1)
        return min(
            (c for c in candidates if _quality(c.fit) >= enough),
            key=lambda c: np.abs(np.linalg.norm(c.fit.lattice.basis, axis=1) / known - 1).sum(),
        )

    def _chance(self, spots: Spots, fit: FoundLattice, n_searched: int, target: Target) -> float:
        return lattice_refinement.chance(
            spots.select(fit.spots),
            fit.h,
            fit.lattice,
            n_searched,
            len(target.model.strains),
            len(target.known.rotations),
            abs(float(np.linalg.det(target.known.basis))),
        )

    def _refine_alone(self, spots: Spots, start: Lattice, pixel_size: float, target: Target) -> FoundLattice:
        owner, h = self._assign(spots, np.ones(len(spots), dtype=bool), [start], target)
        # spots anywhere lie near a lattice point with a probability that is the volume of a sphere
        share = 4 / 3 * np.pi * self.settings.hkl_tolerance**3
        by_chance = share * len(spots) + _BEYOND_CHANCE * np.sqrt(share * (1 - share) * len(spots))
        if np.count_nonzero(owner >= 0) < by_chance:
            raise _NoFit("it explains hardly more spots than any lattice")
        return self._refine_together(spots, owner, h, [start], pixel_size, target)[0]

    def _assign(
        self, spots: Spots, usable: np.ndarray, lattices: list[Lattice], target: Target
    ) -> tuple[np.ndarray, np.ndarray]:
        direct = np.array([target.to_reduced @ lattice.direct for lattice in lattices])
        owner, h = lattice_refinement.assign_indices(spots.q, direct, self.settings.hkl_tolerance)
        owner[~usable] = -1
        back = np.linalg.inv(target.to_reduced)
        return owner, np.rint(h @ back.T).astype(np.int64)

    def _refine_together(
        self,
        spots: Spots,
        owner: np.ndarray,
        h: np.ndarray,
        lattices: list[Lattice],
        pixel_size: float,
        target: Target,
    ) -> list[FoundLattice]:
        """Refine, reject by position, refine, reject by position and by delta psi, refine."""
        kept = np.nonzero(owner >= 0)[0]
        fits = self._fit(spots, owner, h, kept, lattices, target)
        if self.settings.reject_outliers:
            kept = kept[~self._far(spots, owner, h, kept, fits)]
            fits = self._fit(spots, owner, h, kept, fits, target)
        outside = ~self._zone(spots, owner, h, kept, fits)[0]
        if self.settings.reject_outliers:
            outside |= self._far(spots, owner, h, kept, fits)
        kept = kept[~outside]
        fits = self._fit(spots, owner, h, kept, fits, target)
        _, mosaics = self._zone(spots, owner, h, kept, fits)
        found = []
        for k, (fit, mosaic) in enumerate(zip(fits, mosaics)):
            own = kept[owner[kept] == k]
            self._check_volume(fit, lattices[k])
            rmsd_px = _rmsd(spots.select(own), h[own], fit) / pixel_size
            found.append(FoundLattice(fit, own, h[own], mosaic, rmsd_px))
        return found

    def _fit(
        self,
        spots: Spots,
        owner: np.ndarray,
        h: np.ndarray,
        kept: np.ndarray,
        lattices: list[Lattice],
        target: Target,
    ) -> list[Lattice]:
        fits = []
        for k, lattice in enumerate(lattices):
            own = kept[owner[kept] == k]
            try:
                fit = lattice_refinement.refine_lattice(
                    spots.select(own), h[own], lattice, target.model.strains, self.settings.delta_psi_weight
                )
            except (ValueError, np.linalg.LinAlgError) as error:
                raise _NoFit(str(error)) from error
            fits.append(fit.lattice)
        return fits

    def _far(
        self, spots: Spots, owner: np.ndarray, h: np.ndarray, kept: np.ndarray, lattices: list[Lattice]
    ) -> np.ndarray:
        outlier = np.empty(len(kept), dtype=bool)
        for k, lattice in enumerate(lattices):
            mine = owner[kept] == k
            own = kept[mine]
            prediction = lattice_refinement.predict(h[own], lattice, spots.d_inverse[own], spots.s0)
            distance = np.linalg.norm(prediction.xy - spots.xy[own], axis=1)
            outlier[mine] = lattice_refinement.positional_outliers(distance)
        return outlier

    def _zone(
        self, spots: Spots, owner: np.ndarray, h: np.ndarray, kept: np.ndarray, lattices: list[Lattice]
    ) -> tuple[np.ndarray, list[mosaicity.Mosaicity]]:
        settings = self.settings
        inside = np.zeros(len(kept), dtype=bool)
        mosaics = []
        for k, lattice in enumerate(lattices):
            mine = owner[kept] == k
            own = kept[mine]
            try:
                mosaic = _mosaicity(spots.select(own), h[own], lattice)
            except ValueError as error:
                raise _NoFit(str(error)) from error
            volume = mosaicity.ewald_proximal_volume(
                1 / float(np.linalg.norm(spots.s0)), settings.proximity_d_min, mosaic
            )
            if volume > settings.max_proximal_volume:
                raise _NoFit(f"Ewald proximal volume of {volume:.4f}")
            inside[mine] = mosaic.accepted
            mosaics.append(mosaic)
        return inside, mosaics

    def _check_volume(self, refined: Lattice, start: Lattice) -> None:
        limit = self.settings.max_volume_change
        change = abs(np.linalg.det(refined.basis) / np.linalg.det(start.basis) - 1)
        if limit is not None and change > limit:
            raise _NoFit(f"the volume of the cell changed by {100 * change:.0f}%")

    def _as_dials(self, experiment: Experiment, table: Any, found: list[FoundLattice]) -> Crystals:
        experiments = ExperimentList()
        if not found:
            return Crystals(experiments, flex.reflection_table())
        imageset = still_imageset(experiment)
        for k, lattice in enumerate(found):
            experiments.append(
                Experiment(  # type: ignore[call-arg]  # the stubs of dxtbx know no defaults
                    beam=experiment.beam,
                    detector=experiment.detector,
                    crystal=self._crystal(lattice),
                    imageset=imageset,
                    identifier=lattice_identifier(experiment, imageset, k),
                )
            )
        return Crystals(experiments, indexed_table(experiment, experiments, table, found))

    def _crystal(self, found: FoundLattice) -> MosaicCrystalSauter2014:
        settings = self.settings
        crystal = MosaicCrystalSauter2014(_crystal(found.lattice.direct, self._space_group))
        crystal.set_half_mosaicity_deg(
            found.mosaic.half_mosaicity_deg if settings.half_mosaicity is None else settings.half_mosaicity
        )
        crystal.set_domain_size_ang(
            found.mosaic.expanded_domain_size if settings.domain_size is None else settings.domain_size
        )
        return crystal


def _rmsd(own: Spots, h: np.ndarray, lattice: Lattice) -> float:
    """Of positions and predictions of the spots of a lattice, in mm."""
    prediction = lattice_refinement.predict(h, lattice, own.d_inverse, own.s0)
    return float(np.sqrt(np.mean(((prediction.xy - own.xy) ** 2).sum(axis=1))))


def _mosaicity(own: Spots, h: np.ndarray, lattice: Lattice) -> mosaicity.Mosaicity:
    prediction = lattice_refinement.predict(h, lattice, own.d_inverse, own.s0)
    spacing = 1 / np.linalg.norm(h @ lattice.setting.T, axis=1)
    return mosaicity.fit_mosaicity(spacing, prediction.delta_psi, abs(np.linalg.det(lattice.basis)))


def _smallest_rmsd(found: FoundLattice) -> float:
    return -found.rmsd_px


def _quality(found: FoundLattice) -> float:
    """Number of spots, discounted for a worse fit: a smaller set of spots always fits better.

    The power was chosen on split thaumatin crystals, where sets of 5 to 30% more spots with an rmsd larger by
    about as much, within true and within wrong geometry, are worth the same.
    """
    return len(found.spots) / max(found.rmsd_px, 0.5) ** 0.6


def _crystal(direct: np.ndarray, space_group: sgtbx.space_group) -> Any:
    a, b, c = (tuple(map(float, row)) for row in direct)
    return Crystal(a, b, c, space_group=space_group)  # type: ignore[call-overload]  # vectors are numbers in the stubs


def _misorientation(one: Lattice, other: Lattice, rotations: np.ndarray) -> float:
    """Smallest angle in degrees between two lattices, over the rotations of the lattice."""
    difference = one.orientation.T @ other.orientation
    trace = np.einsum("gij,ji->g", rotations, difference).max()
    return float(np.degrees(np.arccos(np.clip(0.5 * (trace - 1), -1, 1))))


def _longest_cell(table: Any) -> float | None:
    # what DIALS takes for max_cell=Auto; it can take the longest of all images, which is not known here
    try:
        return max(find_max_cell(table).max_cell, _LONG_CELL)
    except (DialsIndexError, AssertionError) as error:
        logger.debug("no estimate of the longest cell axis: %s", error)
        return None


def read_settings(params: Any) -> Settings:
    """The parameters of ``dials.ssx_index`` that the fast engine uses."""
    indexing, stills = params.indexing, params.indexing.stills
    max_refine = indexing.basis_vector_combinations.max_refine
    return Settings(
        min_spots=params.min_spots,
        max_lattices=indexing.multiple_lattice_search.max_lattices,
        minimum_angular_separation=indexing.multiple_lattice_search.minimum_angular_separation,
        recycle_cutoff=indexing.multiple_lattice_search.recycle_unindexed_reflections_cutoff,
        hkl_tolerance=indexing.index_assignment.simple.hkl_tolerance,
        d_min=indexing.refinement_protocol.d_min_start,
        length_tolerance=indexing.known_symmetry.relative_length_tolerance,
        angle_tolerance=indexing.known_symmetry.absolute_angle_tolerance,
        max_rmsd_px=_rmsd_limit(indexing),
        proximity_d_min=stills.ewald_proximity_resolution_cutoff,
        max_proximal_volume=stills.ewald_proximal_volume_max,
        # the sanity check of DIALS
        max_volume_change=None if indexing.refinement_protocol.disable_unit_cell_volume_sanity_check else 0.5,
        reject_outliers=stills.candidate_outlier_rejection,
        delta_psi_weight=params.refinement.reflections.weighting_strategy.delpsi_constant,
        domain_size=stills.set_domain_size_ang_value,
        half_mosaicity=stills.set_mosaic_half_deg_value,
        min_cell=indexing.min_cell,
        min_volume=indexing.min_cell_volume,
        methods=tuple(method for method in params.method if method in _METHODS),
        fft_grid=indexing.fft1d.characteristic_grid,
        direction_grid=indexing.real_space_grid_search.characteristic_grid,
        max_vectors=indexing.real_space_grid_search.max_vectors or _EVERY_VECTOR,
        max_cell_multiplier=indexing.max_cell_estimation.multiplier,
        max_refined=_MAX_REFINED_BY_DIALS if max_refine in (Auto, None) else max_refine,
        max_delta=indexing.known_symmetry.max_delta,
        candidates_with_symmetry=stills.refine_candidates_with_known_symmetry,
    )


def _rmsd_limit(indexing: Any) -> float:
    # renamed in DIALS 3.27; Auto means 2 px for stills there
    for path in ("basis_vector_combinations.xy_rmsd_threshold", "stills.rmsd_min_px"):
        limit = dials_compat.parameter(indexing, path)
        if limit is not None and limit is not Auto:
            return limit
    return 2.0
