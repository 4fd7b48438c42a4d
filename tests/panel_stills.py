"""Stills on a detector of two sides with three panels each, made up: no image is read and nothing is searched for."""

from __future__ import annotations

import numpy as np
from dxtbx.model import BeamFactory, Crystal, Detector, Experiment, ExperimentList

from ssx_mpi.kernels.lattice_refinement import prediction_gradients
from ssx_mpi.kernels.rotations import rotation_matrices

SIZE = (30.0, 25.0)
DISTANCE = 100.0


def detector(motions: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = None) -> Detector:
    """Two sides of three panels in an arm at the distance; each panel moved by a shift and a turn in its own frame."""
    made = Detector()
    root = made.hierarchy()
    root.set_name("arm")
    root.set_local_frame((1, 0, 0), (0, -1, 0), (0, 0, -DISTANCE))
    for side, x in enumerate((-62.0, 2.0)):
        group = root.add_group()
        group.set_name(f"side {side}")
        group.set_local_frame((1, 0, 0), (0, 1, 0), (x, -40.0, 0))
        for k in range(3):
            panel = group.add_panel()
            shift, turn = (motions or {}).get((side, k), (np.zeros(3), np.zeros(3)))
            rotation = rotation_matrices(turn)
            middle = np.array([SIZE[0] / 2, SIZE[1] / 2, 0])
            origin = np.array([0, 28.0 * k, 0]) + middle - rotation @ middle + shift
            panel.set_local_frame(tuple(rotation[:, 0]), tuple(rotation[:, 1]), tuple(origin))
            panel.set_name(f"panel {side}{k}")
            panel.set_pixel_size((0.1, 0.1))
            panel.set_image_size((300, 250))
            panel.set_trusted_range((0, 1e6))
    return made


def misplacements(seed: int, shift: float = 0.1, turn: float = 2e-3):
    rng = np.random.default_rng(seed)
    return {(s, k): (rng.normal(0, shift, 3), rng.normal(0, turn, 3)) for s in range(2) for k in range(3)}


def stills(true: Detector, n: int, seed: int, noise: float = 0.01):
    """Experiments on the detector of the header, with reflections seen on the `true` one."""
    from dials.array_family import flex

    rng = np.random.default_rng(seed)
    beam = BeamFactory.simple(1.0)
    s0 = np.array(beam.get_s0())
    grid = np.stack(np.meshgrid(*[np.arange(-30, 31)] * 3), -1).reshape(-1, 3)
    inverse = [np.linalg.inv(np.reshape(panel.get_d_matrix(), (3, 3))) for panel in true]
    experiments, header = ExperimentList(), detector()
    rows: dict[str, list] = {"hkl": [], "panel": [], "xy": [], "id": []}
    for number in range(n):
        q, r = np.linalg.qr(rng.normal(size=(3, 3)))
        turn = q * np.sign(np.diag(r))
        turn = turn if np.linalg.det(turn) > 0 else -turn
        a, b, c = (turn @ np.diag([79.1, 79.1, 38.2])).T.tolist()
        crystal = Crystal(a, b, c, space_group_symbol="P 43 21 2")
        points = grid @ np.reshape(crystal.get_A(), (3, 3)).T
        length, off = np.linalg.norm(points, axis=1), np.linalg.norm(s0 + points, axis=1) - 1
        near = (length > 0.05) & (length < 0.55) & (np.abs(off) < 5e-4)
        for panel, own in enumerate(inverse):
            predicted = prediction_gradients(
                points[near], np.empty((0, near.sum(), 3)), np.repeat(own[None], near.sum(), 0), s0
            )[0]
            inside = np.all((predicted.xy > 0) & (predicted.xy < SIZE), axis=1)
            rows["hkl"].append(grid[near][inside])
            rows["panel"].append(np.full(inside.sum(), panel))
            rows["xy"].append(predicted.xy[inside] + rng.normal(0, noise, (inside.sum(), 2)))
            rows["id"].append(np.full(inside.sum(), number))
        experiments.append(Experiment(beam=beam, detector=header, crystal=crystal, identifier=f"crystal-{number}"))
    table = flex.reflection_table()
    hkl, xy = np.concatenate(rows["hkl"]), np.concatenate(rows["xy"])
    table["miller_index"] = flex.miller_index([tuple(map(int, h)) for h in hkl])
    table["xyzobs.mm.value"] = flex.vec3_double([(*map(float, p), 0.0) for p in xy])
    table["panel"] = flex.size_t(np.concatenate(rows["panel"]).tolist())
    table["id"] = flex.int(np.concatenate(rows["id"]).tolist())
    table["flags"] = flex.size_t(len(table), 0)
    for number in range(n):
        table.experiment_identifiers()[number] = f"crystal-{number}"
    return experiments, table
