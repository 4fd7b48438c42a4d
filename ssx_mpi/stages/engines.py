"""Putting the algorithms of a run together from its parameters."""

from __future__ import annotations

from ssx_mpi.dials_parameters import DialsParameters
from ssx_mpi.params import Parameters
from ssx_mpi.stages.dials_engine import DialsIndexer, DialsIntegrator, DialsSpotFinder
from ssx_mpi.stages.stills import Engine


def build_engine(parameters: Parameters, scopes: DialsParameters) -> Engine:
    """The algorithms that a run was asked for."""
    return _dials_engine(scopes)


def _dials_engine(scopes: DialsParameters) -> Engine:
    return Engine(
        find_spots=DialsSpotFinder(scopes.spotfinding),
        index=DialsIndexer(scopes.indexing),
        integrate=DialsIntegrator(scopes.integration),
    )
