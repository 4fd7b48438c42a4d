"""Unit-cell filter over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels import cell_clusters
from ssx_mpi.kernels.cell_clusters import CellCluster
from ssx_mpi.kernels.exact_sums import exact_median
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import CellFilter

_SAMPLE = 1000


@dataclass(frozen=True)
class FilteredCells:
    """Cells kept: (n_crystals,) bool for this rank; the centre (6,) and, where made, the clusters of the sample."""

    keep: np.ndarray
    centre: np.ndarray
    clusters: tuple[CellCluster, ...] = ()


def filter_cells(comm: Communicator, cells: np.ndarray, numbers: np.ndarray, n_total: int, how: CellFilter):
    """Which crystals have a cell like the others. Collective.

    Parameters
    ----------
    cells
        (n_crystals, 6) of this rank.
    numbers
        (n_crystals,) int64 in the whole data set.
    n_total
        Crystals of all ranks.
    """
    keep = np.ones(len(cells), dtype=bool)
    clusters: tuple[CellCluster, ...] = ()
    if how.threshold:
        sample = comm.allgather(cells[numbers % max(1, -(-n_total // _SAMPLE)) == 0])
        together = np.concatenate(sample)
        clusters = tuple(cell_clusters.cluster_cells(together, how.threshold))
        labels = np.empty(len(together), dtype=np.int64)
        for label, cluster in enumerate(clusters):
            labels[cluster.members] = label
        keep = cell_clusters.nearest_cluster(cells, together, labels, how.threshold) == 0
    centre = np.array(how.central) if how.central is not None else exact_median(comm, cells[keep])
    length = how.length_tolerance or np.inf
    angle = how.angle_tolerance or np.inf
    return FilteredCells(keep & cell_clusters.within_tolerance(cells, centre, length, angle), centre, clusters)
