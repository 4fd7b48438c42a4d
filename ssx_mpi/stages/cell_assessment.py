"""Which unit cells a set of crystals has, and what symmetry their metric allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Andrews-Bernstein distance in G6 (angstrom squared) below which crystals belong together, as in dials.ssx_index
_THRESHOLD = 5000.0
# degrees by which a lattice may miss a symmetry; crystals of one still each are no better known
_MAX_DELTA = 2.0


@dataclass(frozen=True)
class CellCluster:
    """Crystals with alike cells.

    Attributes
    ----------
    members
        Numbers of the crystals.
    cell, spread
        Median and standard deviation of the primitive reduced cells, angstrom and degrees.
    metric_symmetry
        Highest space group that the metric of the median cell allows, without translations, such as "P 4 2 2".
    best_cell
        The median cell in the setting of that symmetry, obeying it.
    """

    members: tuple[int, ...]
    cell: tuple[float, ...]
    spread: tuple[float, ...]
    metric_symmetry: str
    best_cell: tuple[float, ...]


@dataclass(frozen=True)
class Assessment:
    """Clusters of cells, most populous first, of `cells`: reduced cells of all crystals, (n, 6) float64."""

    clusters: tuple[CellCluster, ...]
    cells: np.ndarray

    @property
    def n_crystals(self) -> int:
        return len(self.cells)


def assess(experiments) -> Assessment:
    """Cluster the cells of the crystals of `experiments`."""
    from cctbx import crystal

    symmetries = [
        crystal.symmetry(
            unit_cell=e.crystal.get_unit_cell(),
            space_group=e.crystal.get_space_group(),
            assert_is_compatible_unit_cell=False,
        ).niggli_cell()
        for e in experiments
    ]
    cells = np.array([s.unit_cell().parameters() for s in symmetries])
    groups = sorted(_groups(symmetries), key=lambda members: (-len(members), members))
    return Assessment(tuple(_describe(members, cells) for members in groups), cells)


def _groups(symmetries) -> list[tuple[int, ...]]:
    if len(symmetries) == 1:
        return [(0,)]
    from dials.algorithms.clustering.unit_cell import cluster_unit_cells

    found = cluster_unit_cells(symmetries, threshold=_THRESHOLD)
    return [tuple(sorted(int(i) for i in cluster.lattice_ids)) for cluster in found.clusters]


def _describe(members: tuple[int, ...], cells: np.ndarray) -> CellCluster:
    from cctbx import crystal
    from cctbx.sgtbx import lattice_symmetry

    own = cells[list(members)]
    median = tuple(np.median(own, axis=0).tolist())
    reduced = crystal.symmetry(unit_cell=median, space_group_symbol="P 1")
    best = lattice_symmetry.metric_subgroups(reduced, max_delta=_MAX_DELTA).result_groups[0]
    symmetry = best["best_subsym"]
    return CellCluster(
        members=members,
        cell=median,
        spread=tuple(np.std(own, axis=0).tolist()),
        metric_symmetry=str(symmetry.space_group().build_derived_acentric_group().info()),
        best_cell=tuple(symmetry.unit_cell().parameters()),
    )
