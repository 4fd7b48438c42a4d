"""How many nodes and how much time to ask for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

#: CPU-seconds of an image where nothing is known: a 4 Mpx image, every third one a hit, with the fast engine
TYPICAL_COST = 0.5
# a rank that has fewer images waits for others and for its own start-up for too large a part of the time
_FEWEST_IMAGES = 200
# start-up, geometry refinement and the last files, in seconds; and how much longer than thought it may take
_FIXED_SECONDS, _RESERVE = 180.0, 1.5
# runs are short where nodes allow it, since short jobs start early
_WANTED_SECONDS = 1200.0
_ROUND_TO = 300.0


@dataclass(frozen=True)
class Estimate:
    """`nodes` for `seconds` (reserve included), for images that cost `cost` CPU-seconds each."""

    nodes: int
    seconds: float
    cost: float

    @property
    def time(self) -> str:
        """As Slurm writes it."""
        minutes, seconds = divmod(int(self.seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours:02d}:{minutes:02d}:{seconds:02d}"


def suggest(n_images: int, cost: float, ranks_per_node: int, nodes: int | None = None) -> Estimate:
    """Nodes (where not given) and time for a run.

    As many nodes as end within twenty minutes, as long as each rank has 200 images or more.

    Parameters
    ----------
    n_images
        Of the run.
    cost
        CPU-seconds of an image on average, blanks included.
    ranks_per_node
        Ranks on each node.
    nodes
        Given by the user.
    """
    if nodes is None:
        wanted = math.ceil(n_images * cost / (_WANTED_SECONDS * ranks_per_node))
        nodes = max(1, min(wanted, n_images // (_FEWEST_IMAGES * ranks_per_node)))
    seconds = _FIXED_SECONDS + _RESERVE * n_images * cost / (nodes * ranks_per_node)
    return Estimate(nodes, _ROUND_TO * math.ceil(seconds / _ROUND_TO), cost)


def measured_cost(status: Path) -> float | None:
    """CPU-seconds an image took in an earlier run, from its ``ssx_mpi.json``; None where it has none."""
    try:
        total = json.loads(status.read_text())["total"]
        return sum(total["cpu_seconds"].values()) / total["counts"]["images"]
    except (OSError, ValueError, KeyError, ZeroDivisionError):
        return None
