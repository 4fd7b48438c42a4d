"""The engine of a run, put together from its parameters."""

from __future__ import annotations

from ssx_mpi.images.frames import FrameReader
from ssx_mpi.parameters.dials_parameters import DialsParameters
from ssx_mpi.parameters.run_parameters import Parameters
from ssx_mpi.stages.dials.dials_stages import DialsIndexer, DialsIntegrator, DialsSpotFinder
from ssx_mpi.stages.fast.fast_indexing import FastIndexer
from ssx_mpi.stages.fast.fast_integration import FastEllipsoidIntegrator
from ssx_mpi.stages.fast.fast_spotfinding import FastSpotFinder
from ssx_mpi.stages.protocols import Engine

_SPOTS, _INDEXING, _INTEGRATION = "spot finding", "indexing", "integration"


def left_to_dials(parameters: Parameters, scopes: DialsParameters) -> dict[str, str]:
    """Stages that the fast engine does not cover with these parameters, and why; empty with ``engine=dials``."""
    if parameters.engine == "dials":
        return {}
    covered = {
        _SPOTS: FastSpotFinder.supports(scopes.spotfinding),
        _INDEXING: FastIndexer.supports(scopes.indexing),
        _INTEGRATION: FastEllipsoidIntegrator.supports(scopes.integration),
    }
    return {stage: reason for stage, (supported, reason) in covered.items() if not supported}


def build_engine(parameters: Parameters, scopes: DialsParameters) -> Engine:
    """The algorithms that a run was asked for, stage by stage.

    Raises
    ------
    InputError
        When DIALS is to integrate with an ellipsoid model that the installed version does not have.
    """
    stages = {_SPOTS, _INDEXING, _INTEGRATION}
    fast = set() if parameters.engine == "dials" else stages - set(left_to_dials(parameters, scopes))
    model = parameters.integration.rlp_mosaicity
    return Engine(
        # DIALS finds the pixels where dxtbx keeps them, when they were read through dxtbx
        read=FrameReader(share_with_dxtbx=not {_SPOTS, _INTEGRATION} <= fast),
        spot_finder=FastSpotFinder(scopes.spotfinding) if _SPOTS in fast else DialsSpotFinder(scopes.spotfinding),
        indexer=FastIndexer(scopes.indexing) if _INDEXING in fast else DialsIndexer(scopes.indexing),
        integrator=FastEllipsoidIntegrator(scopes.integration, model=model)
        if _INTEGRATION in fast
        else DialsIntegrator(scopes.integration),
    )
