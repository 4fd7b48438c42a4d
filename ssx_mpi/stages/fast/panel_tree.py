"""The tree of a dxtbx detector as levels of nodes that move, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ssx_mpi.kernels.detector_refinement import JointGeometry, PanelLevel, RefinedDetector
from ssx_mpi.parameters.run_parameters import PanelPriors

# where the data are to tell the widths they start from here: mm and degrees
_EXPECTED_SHIFT, _EXPECTED_TILT = 0.1, 0.1


@dataclass(frozen=True)
class MovedNode:
    """How a node of the tree was moved.

    Attributes
    ----------
    name : str
    level : int
    panels : tuple of int
    n_spots : int
        Spots with weight on it.
    shift, shift_sigma : (3,) floats
        Along its fast and slow axes and its normal (away from the crystal), mm, against the node above it.
    turn, turn_sigma : (3,) floats
        About them, degrees.
    """

    name: str
    level: int
    panels: tuple[int, ...]
    n_spots: int
    shift: tuple[float, ...]
    shift_sigma: tuple[float, ...]
    turn: tuple[float, ...]
    turn_sigma: tuple[float, ...]

    def since(self, earlier: MovedNode | None) -> MovedNode:
        """The same node, with its motion in an earlier refinement added, which is small against its size."""
        if earlier is None:
            return self
        return replace(
            self,
            shift=tuple(a + b for a, b in zip(self.shift, earlier.shift)),
            turn=tuple(a + b for a, b in zip(self.turn, earlier.turn)),
        )


@dataclass(frozen=True)
class PanelTree:
    """Levels of a detector below the whole.

    Attributes
    ----------
    depth : int
        Number of the last level; 0 where there are none below the whole.
    paths : tuple of lists
        For each level from 1 on the nodes that hold panels, each by the numbers of children on the way from the root.
    node : tuple of (n_panels,) int64
        Node of each panel, level by level from 1 on; a panel that ends above a level is a node of its own there.
    distinct : tuple of int
        Levels that cut the detector otherwise than the level above.
    priors : PanelPriors
    """

    depth: int
    paths: tuple[list[tuple[int, ...]], ...]
    node: tuple[np.ndarray, ...]
    distinct: tuple[int, ...]
    priors: PanelPriors

    def refined(self, level: int) -> list[int]:
        """The levels below the whole that are refined down to `level`."""
        return [k for k in self.distinct if k <= level]

    def with_levels(self, geometry: JointGeometry, detector, level: int) -> JointGeometry:
        """`geometry`, that of `detector` and not yet moved, with the nodes down to `level` free to move."""
        levels, frames = [geometry.levels[0]], [geometry.frames[0]]
        for k in self.refined(level):
            levels.append(_level(self.node[k - 1], self.priors))
            frames.append(np.array([frame_of(_node(detector, path)) for path in self.paths[k - 1]]))
        motions = tuple(np.zeros((each.n_nodes, 6)) for each in levels)
        return replace(geometry, levels=tuple(levels), frames=tuple(frames), motions=motions)

    def write(self, detector, geometry: JointGeometry, level: int) -> None:
        """Move `detector`, the tree of which this is, to where `geometry` has it after refinement down to `level`."""
        root = detector.hierarchy()
        # the frame of the whole is that of the first panel before the nodes below moved it
        turn, shift = _motion(frame_of(detector[0]), geometry.frames[0][0])
        frame = turn @ frame_of(root)
        frame[:, 2] += shift
        _set_frame(root, frame, None)
        for k, frames in zip(self.refined(level), geometry.frames[1:]):
            for path, frame in zip(self.paths[k - 1], frames):
                node = _node(detector, path)
                _set_frame(node, frame, frame_of(node.parent()))

    def moved(self, detector, refined: RefinedDetector, level: int) -> tuple[MovedNode, ...]:
        """What became of the nodes below the whole."""
        result = []
        geometry, sigma = refined.geometry, refined.uncertainty.nodes
        for k, motions, sigmas in zip(self.refined(level), geometry.motions[1:], sigma[1:]):
            for number, path in enumerate(self.paths[k - 1]):
                panels = np.flatnonzero(self.node[k - 1] == number)
                name = _node(detector, path).get_name()
                result.append(
                    MovedNode(
                        name=name or ".".join(map(str, path)),
                        level=k,
                        panels=tuple(panels.tolist()),
                        n_spots=int(refined.spots_by_panel[panels].sum()),
                        shift=tuple(motions[number, :3].tolist()),
                        shift_sigma=tuple(sigmas[number, :3].tolist()),
                        turn=tuple(np.degrees(motions[number, 3:]).tolist()),
                        turn_sigma=tuple(np.degrees(sigmas[number, 3:]).tolist()),
                    )
                )
        return tuple(result)


def panel_tree(detector, priors: PanelPriors) -> PanelTree:
    """The levels of a dxtbx `detector`."""
    leaves: list[tuple[int, ...]] = []

    def walk(node, path: tuple[int, ...]) -> None:
        if node.is_panel():
            leaves.append(path)
            return
        for number, child in enumerate(node):
            walk(child, (*path, number))

    walk(detector.hierarchy(), ())
    order = {_node(detector, path).index(): path for path in leaves}
    leaves = [order[number] for number in range(len(leaves))]
    depth = max(len(path) for path in leaves) if len(leaves) > 1 else 0
    paths, numbers, distinct = [], [], []
    above = np.zeros(len(leaves), dtype=np.int64)
    for level in range(1, depth + 1):
        names = [path[:level] for path in leaves]
        own = list(dict.fromkeys(names))
        number = np.array([own.index(name) for name in names])
        paths.append(own)
        numbers.append(number)
        if number.max() > above.max():
            distinct.append(level)
        above = number
    return PanelTree(depth, tuple(paths), tuple(numbers), tuple(distinct), priors)


def movement_px(before, after) -> tuple[float, float]:
    """How far rays are recorded from where they were, in pixels, when a dxtbx detector `before` becomes `after`.

    Returns
    -------
    rms, largest : float
        Over a grid of points on all panels.
    """
    found = []
    for old, new in zip(before, after):
        size, pixel = np.array(old.get_image_size_mm()), np.array(old.get_pixel_size())
        for share in np.stack(np.meshgrid(*2 * [np.linspace(0.0, 1.0, 5)]), axis=-1).reshape(-1, 2):
            point = share * size
            try:
                there = new.get_ray_intersection(old.get_lab_coord(tuple(map(float, point))))
            except RuntimeError:
                # the panel stands along the ray
                continue
            found.append(float(np.hypot(*((np.array(there) - point) / pixel))))
    return float(np.sqrt(np.mean(np.square(found)))), float(np.max(found))


def _level(node: np.ndarray, priors: PanelPriors) -> PanelLevel:
    """The level whose panels belong to the nodes `node` (n_panels,)."""
    widths = np.repeat([priors.shift or _EXPECTED_SHIFT, np.radians(priors.tilt or _EXPECTED_TILT)], 3)
    return PanelLevel(node, widths, np.repeat([priors.shift is None, priors.tilt is None], 3))


def _node(detector, path: tuple[int, ...]):
    node = detector.hierarchy()
    for number in path:
        node = node[number]
    return node


def frame_of(node) -> np.ndarray:
    """Fast axis, slow axis and origin in the laboratory as columns, (3, 3)."""
    return np.stack([node.get_fast_axis(), node.get_slow_axis(), node.get_origin()], axis=1)


def _square(frame: np.ndarray) -> np.ndarray:
    fast, slow = frame[:, 0], frame[:, 1]
    return np.stack([fast, slow, np.cross(fast, slow)], axis=1)


def _motion(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rotation and the translation, x -> rotation x + translation, that take one frame to the other."""
    turn = _square(after) @ _square(before).T
    return turn, after[:, 2] - turn @ before[:, 2]


def _set_frame(node, frame: np.ndarray, parent: np.ndarray | None) -> None:
    """Put `node` to `frame` in the laboratory; `parent` is the frame of the node above it there."""
    if parent is not None:
        turn = _square(parent).T
        frame = np.concatenate([turn @ frame[:, :2], (turn @ (frame[:, 2] - parent[:, 2]))[:, None]], axis=1)
    node.set_local_frame(*(tuple(map(float, frame[:, k])) for k in range(3)))
