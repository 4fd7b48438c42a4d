"""Putting the algorithms of a run together from its parameters."""

from __future__ import annotations

from ssx_mpi.images.frames import Frame, FrameReader
from ssx_mpi.parameters.dials_parameters import DialsParameters
from ssx_mpi.parameters.run_parameters import Parameters
from ssx_mpi.stages.dials.dials_stages import DialsIndexer, DialsIntegrator, DialsSpotFinder
from ssx_mpi.stages.fast import fast_spotfinding
from ssx_mpi.stages.fast.fast_indexing import FastIndexer
from ssx_mpi.stages.fast.fast_integration import FastEllipsoidIntegrator
from ssx_mpi.stages.fast.fast_spotfinding import FastSpotFinder
from ssx_mpi.stages.still_results import Crystals, StageError, library_errors, short_reason
from ssx_mpi.stages.stills import Engine


def left_to_dials(parameters: Parameters, scopes: DialsParameters) -> dict[str, str]:
    """Stages that the fast engine does not cover with these parameters, and why; empty with ``engine=dials``."""
    if parameters.engine == "dials":
        return {}
    covered = {
        "spot finding": fast_spotfinding.supports(scopes.spotfinding),
        "indexing": FastIndexer.supports(scopes.indexing),
        "integration": FastEllipsoidIntegrator.supports(scopes.integration),
    }
    return {stage: reason for stage, (supported, reason) in covered.items() if not supported}


def build_engine(parameters: Parameters, scopes: DialsParameters) -> Engine:
    """The algorithms that a run was asked for, stage by stage.

    Raises
    ------
    InputError
        When DIALS is to integrate with an ellipsoid model that the installed version does not have.
    """
    left = left_to_dials(parameters, scopes)
    fast = parameters.engine == "fast"
    finder = DialsSpotFinder(scopes.spotfinding)
    indexer = DialsIndexer(scopes.indexing)
    # DIALS finds the pixels where dxtbx keeps them, when they were read through dxtbx
    all_fast = fast and "spot finding" not in left and "integration" not in left
    return Engine(
        read=FrameReader(share_with_dxtbx=not all_fast),
        find_spots=_FastSpots(scopes.spotfinding) if fast and "spot finding" not in left else finder,
        index=_FastIndex(scopes.indexing) if fast and "indexing" not in left else indexer,
        integrate=_FastIntegrate(parameters, scopes) if fast and "integration" not in left else _dials(scopes),
    )


def _dials(scopes: DialsParameters) -> DialsIntegrator:
    return DialsIntegrator(scopes.integration)


class _FastSpots:
    def __init__(self, scope) -> None:
        self._find = FastSpotFinder(scope)

    def __call__(self, experiment, frame: Frame):
        return self._find(frame, experiment)


class _FastIndex:
    def __init__(self, scope) -> None:
        self._indexer = FastIndexer(scope)

    def __call__(self, experiment, strong) -> Crystals:
        try:
            experiments, reflections = self._indexer.index(experiment, strong)
        except library_errors() as error:
            # one image must not cost the night; the reason stands in the counts of what was left out
            raise StageError(short_reason(error)) from error
        if not len(experiments):
            raise StageError("no lattice found")
        return Crystals(experiments, reflections)


class _FastIntegrate:
    def __init__(self, parameters: Parameters, scopes: DialsParameters) -> None:
        model = parameters.integration.rlp_mosaicity
        self._integrator = FastEllipsoidIntegrator(scopes.integration, model=model)

    def __call__(self, crystals: Crystals, frame: Frame) -> tuple[Crystals | None, list[str]]:
        try:
            done = self._integrator.integrate(crystals.experiments, crystals.reflections, frame.data, frame.masks)
        except library_errors() as error:
            return None, [short_reason(error)]
        reasons = [reason for _, reason in done.failures]
        return (Crystals(done.experiments, done.reflections) if len(done.experiments) else None), reasons
