r"""Unit cells: which lie together, and which are strangers.

Cells of one space group in one setting are compared as points in G6, the metric tensor written as
:math:`(a^2, b^2, c^2, 2bc\cos\alpha, 2ac\cos\beta, 2ab\cos\gamma)`, in square angstrom. All crystals were indexed
in the same setting, so no walk over the boundaries of reduced cells is needed.

References
----------
Andrews & Bernstein (1988). Acta Cryst. A44, 1009: the space G6.
Zeldin et al. (2015). Acta Cryst. D71, 352: clustering of serial crystals by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage


@dataclass(frozen=True)
class CellCluster:
    """Cells that are linked: which of the sample (ascending), their median and standard deviation, (6,) each."""

    members: np.ndarray
    median: np.ndarray
    spread: np.ndarray


def g6(cells: np.ndarray) -> np.ndarray:
    """Metric tensors as points in G6.

    Parameters
    ----------
    cells
        (n, 6) lengths in angstrom and angles in degrees.

    Returns
    -------
    vectors : (n, 6) in square angstrom
    """
    a, b, c = cells[:, 0], cells[:, 1], cells[:, 2]
    cosine = np.cos(np.radians(cells[:, 3:]))
    products = np.stack([2 * b * c, 2 * a * c, 2 * a * b], axis=1) * cosine
    return np.concatenate([np.stack([a, b, c], axis=1) ** 2, products], axis=1)


def within_tolerance(cells: np.ndarray, centre: np.ndarray, length: float, angle: float) -> np.ndarray:
    """Cells whose lengths (angstrom) and angles (degrees) all lie within the tolerances of the centre: (n,) bool."""
    difference = np.abs(cells - centre)
    return np.all(difference[:, :3] <= length, axis=1) & np.all(difference[:, 3:] <= angle, axis=1)


def cluster_cells(cells: np.ndarray, threshold: float) -> list[CellCluster]:
    """Single-linkage clusters of cells, the most populous first.

    Cost and memory are quadratic in the number of cells: hand it a sample.

    Parameters
    ----------
    cells
        (n, 6).
    threshold
        Distance in G6, in square angstrom, up to which two cells are linked.
    """
    if len(cells) == 1:
        labels = np.array([1])
    else:
        labels = fcluster(linkage(g6(cells), method="single"), t=threshold, criterion="distance")
    clusters = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        clusters.append(CellCluster(members, np.median(cells[members], axis=0), cells[members].std(axis=0)))
    return sorted(clusters, key=lambda cluster: (-len(cluster.members), cluster.members[0]))


def nearest_cluster(cells: np.ndarray, sample: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """Label of the nearest sampled cell, (n,) int64; -1 where that is further away than the threshold in G6."""
    points, known = g6(cells), g6(sample)
    result = np.full(len(cells), -1, dtype=np.int64)
    for first in range(0, len(cells), 1024):
        block = points[first : first + 1024]
        distance = np.sqrt(np.sum((block[:, None] - known[None]) ** 2, axis=2))
        nearest = np.argmin(distance, axis=1)
        close = distance[np.arange(len(block)), nearest] <= threshold
        result[first : first + len(block)] = np.where(close, labels[nearest], -1)
    return result
