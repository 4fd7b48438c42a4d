"""The algorithms of DIALS as they are, one still at a time: the reference for the fast engine, and its fallback."""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path

from ssx_mpi.images.frames import Frame
from ssx_mpi.stages.still_results import Crystals, IntegratedLattices, by_lattice, joined, library_errors, short_reason


class DialsSpotFinder:
    """Strong spots as ``dials.find_spots`` finds them.

    Parameters
    ----------
    scope
        Extracted scope of dials.find_spots.
    """

    def __init__(self, scope) -> None:
        self._scope = scope

    def find(self, experiment, frame: Frame):
        """Reflection table of the strong spots of the one image of `experiment`; its ``id`` is 0 throughout.

        The pixels come from the imageset, which has kept those of `frame`.
        """
        from dials.array_family import flex
        from dxtbx.model import ExperimentList

        experiments = ExperimentList([experiment])
        return flex.reflection_table.from_observations(experiments, self._scope, is_stills=True)


class DialsIndexer:
    """Lattices as ``dials.ssx_index`` finds them.

    Parameters
    ----------
    scope
        Extracted scope of dials.ssx_index.
    """

    def __init__(self, scope) -> None:
        self._scope = scope

    def index(self, experiment, strong) -> Crystals:
        """Lattices of one still and their spots; no experiment where there is no lattice."""
        from dials.algorithms.indexing.ssx.processing import index_one
        from dials.array_family import flex
        from dxtbx.model import ExperimentList

        # the indexer changes its parameters and its spots
        scope = copy.deepcopy(self._scope)
        spots = copy.deepcopy(strong)
        methods = list(scope.method)
        if not scope.indexing.known_symmetry.unit_cell:
            methods = [m for m in methods if m != "real_space_grid_search"]
        experiments = ExperimentList([experiment])
        spots.centroid_px_to_mm(experiments)
        spots.map_centroids_to_reciprocal_space(experiments)
        # the search prints through rstbx
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            # newer versions return the spots that are left as well; without a method there is nothing at all
            found, indexed = (index_one(experiment, spots, scope, methods, 0) or (None, None))[:2]
        if not found or not len(found):
            return Crystals(ExperimentList(), flex.reflection_table())
        return Crystals(found, indexed)


class DialsIntegrator:
    """Integrated crystals as ``dials.ssx_integrate`` makes them.

    Parameters
    ----------
    scope
        Extracted scope of dials.ssx_integrate.
    """

    def __init__(self, scope) -> None:
        from dials.algorithms.integration.ssx.ellipsoid_integrate import EllipsoidIntegrator
        from dials.algorithms.integration.ssx.stills_integrate import StillsIntegrator

        self._scope = scope
        self._integrator = EllipsoidIntegrator if scope.algorithm == "ellipsoid" else StillsIntegrator

    def integrate(self, crystals: Crystals, frame: Frame) -> IntegratedLattices:
        """Integrate every lattice of one still; the pixels come from the imageset, which has kept those of `frame`."""
        done, failures = [], []
        for experiment, indexed in by_lattice(crystals):
            try:
                done.append(self._integrate(experiment, indexed))
            except library_errors() as error:
                failures.append((experiment.identifier, short_reason(error)))
        return IntegratedLattices(*joined(done), tuple(failures))

    def _integrate(self, experiment, indexed) -> Crystals:
        from dxtbx.model import Experiment, ExperimentList

        integrator = self._integrator(copy.deepcopy(self._scope), collect_data=False)
        # refinement changes the crystal; the imageset is shared, so that the pixels are not read again
        own = Experiment(
            imageset=experiment.imageset,
            beam=experiment.beam,
            detector=experiment.detector,
            crystal=copy.deepcopy(experiment.crystal),
            identifier=experiment.identifier,
        )
        refined, reflections, _ = integrator.run(own, copy.deepcopy(indexed))
        if "shoebox" in reflections:
            del reflections["shoebox"]
        return Crystals(ExperimentList([refined]), reflections)
