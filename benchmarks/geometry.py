"""Joint refinement of a detector's panels: real data, held-out crystals, size, and drifts.

python benchmarks/geometry.py real FOLDER [REFINED]  300 lysozyme crystals on the CSPAD (xfel_metrology), level by
                                                     level; a tenth left out; with REFINED, what dials.refine wrote for
                                                     them (refined.refl), its outliers and weights too
python benchmarks/geometry.py size [CRYSTALS]        made-up spots of 10,000 crystals on 64 sensors: CPU, memory, the
                                                     same bits on 4 parties
python benchmarks/geometry.py drift                  drifts of 60 um in made-up crystals, and none
"""

from __future__ import annotations

import argparse
import copy
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from ssx_mpi import dials_compat
from ssx_mpi.kernels.detector_refinement import GivenWeights, refine_crystals, refine_detector
from ssx_mpi.parameters.run_parameters import PanelPriors

# with weighting_strategy=stills and delpsi_constant=10000 DIALS has these widths for x, y (mm) and delta psi (radians):
# the median weights of its log, 992 / mm^2, and the constant
_DIALS_WIDTHS = np.array([992**-0.5, 992**-0.5, 1e-2])
_LEVELS = (0, 1, 2, 3)


def read_metrology(folder: Path):
    """Experiments and indexed reflections of the set, with predictions."""
    from dials.array_family import flex
    from dxtbx.model import ExperimentList

    experiments = ExperimentList.from_file(str(folder / "benchmark_level2d.json"), check_format=False)
    reflections = flex.reflection_table.from_pickle(str(folder / "benchmark_level2d.pickle"))
    return experiments, reflections


def measure_as_dials(folder: Path, refined: Path) -> None:
    """RMSDs at level 2 with the outliers and the weights of dials.refine."""
    from dials.array_family import flex

    from ssx_mpi.stages.fast import joint_refinement as joint
    from ssx_mpi.stages.fast.panel_tree import panel_tree

    experiments, _ = read_metrology(folder)
    reflections = flex.reflection_table.from_msgpack_file(str(refined))
    detector, beam = experiments[0].detector, experiments[0].beam
    began = time.process_time()
    shared = joint.SharedCrystals(joint.SerialCommunicator(), detector, beam, np.arange(len(experiments)), 300)
    spread = joint._spread(experiments, reflections, shared, None)
    fit = spread.fit
    used = np.asarray(spread.table.get_flags(spread.table.flags.used_in_refinement)).astype(float)
    start = panel_tree(detector, PanelPriors()).with_levels(fit.start, detector, 2)
    done = refine_detector(fit.spots, start, fit.strains, fit.s0, given=GivenWeights(used, _DIALS_WIDTHS))
    spent = time.process_time() - began
    rmsd = np.sqrt((done.residual[used > 0] ** 2).mean(axis=0))
    theirs = dict(zip(("x", "y", "z"), np.asarray(reflections["xyzcal.mm"]).reshape(-1, 3).T))
    flags = np.asarray(reflections.get_flags(reflections.flags.used_in_refinement))
    observed = np.asarray(reflections["xyzobs.mm.value"]).reshape(-1, 3)
    dials = [float(np.sqrt(np.mean((theirs[k] - observed[:, n])[flags] ** 2))) for n, k in enumerate("xy")]
    psi = float(np.sqrt(np.mean(np.asarray(reflections["delpsical.rad"])[flags] ** 2)))
    print(f"level 2, {int(used.sum())} spots of dials.refine with its weights: {rmsd.round(6)} in {spent:.2f} CPU-s")
    print(f"dials.refine itself: {dials[0]:.6f} {dials[1]:.6f} {psi:.6f}")


def measure_real(folder: Path) -> None:
    """RMSDs by level, and the crystals that were left out before and after."""
    from ssx_mpi.kernels.detector_refinement import DetectorSpots
    from ssx_mpi.stages.fast import joint_refinement as joint
    from ssx_mpi.stages.fast.panel_tree import panel_tree

    experiments, reflections = read_metrology(folder)
    print(
        "level  outliers        spots   rmsd x     rmsd y     rmsd psi   CPU-s   largest shift of a panel without spots"
    )
    for level in _LEVELS:
        began = time.process_time()
        refined = joint.refine_fast(experiments, reflections, hierarchy_level=level)
        spent = time.process_time() - began
        without = max((np.abs(n.shift).max() for n in refined.nodes if not n.n_spots), default=0.0)
        last = refined.steps[-1]
        rmsd = f"{last.rmsd_x:10.5f} {last.rmsd_y:10.5f} {np.radians(last.rmsd_psi):10.6f}"
        print(f"{level:<7d}Tukey's       {last.n_reflections:7d} {rmsd} {spent:7.2f} {without:9.4f}")
    began = time.process_time()
    refined = joint.refine_fast(experiments, reflections, hierarchy_level=None)
    spent = time.process_time() - began
    tried = "; ".join(
        f"{t.level}: {1e3 * t.distance:.1f} um, closer by {100 * t.gain:.1f}({100 * t.error:.1f})%"
        for t in refined.levels_tried
    )
    print(f"auto: level {refined.hierarchy_level}, {spent:.2f} CPU-s ({tried})")

    # nine tenths and the tenth that was left out
    detector, beam = copy.deepcopy(experiments[0].detector), experiments[0].beam
    shared = joint.SharedCrystals(
        joint.SerialCommunicator(), detector, beam, np.arange(len(experiments)), len(experiments)
    )
    fit = joint._spread(experiments, reflections, shared, None).fit
    tree = panel_tree(detector, PanelPriors())
    print("a tenth of the crystals left out, each in turn: median distance of their spots from predictions, um")
    totals: dict[int, list] = {level: [] for level in (-1, *_LEVELS)}
    assert isinstance(fit.spots, DetectorSpots) and fit.spots.number is not None
    for tenth in range(10):
        apart = fit.spots.number % 10 == tenth
        others, left_out = fit.of(~apart), fit.of(apart)
        for level in totals:
            panels = left_out.start.panels
            if level >= 0:
                panels = others.refine(tree.with_levels(others.start, detector, level)).geometry.panels
            start = joint.replace(left_out.start, panels=panels)
            tested = refine_crystals(left_out.spots, start, left_out.strains, left_out.s0)
            totals[level].append(np.hypot(*tested.residual[:, :2].T))
    for level, distances in totals.items():
        name = "as it was" if level < 0 else f"level {level}"
        print(f"  {name:10s} {1e3 * np.median(np.concatenate(distances)):7.2f}")


def made_up(n_crystals: int, seed: int = 1):
    """Spots of crystals on the misplaced CSPAD, as the refinement takes them, with the detector of the header."""
    from ssx_mpi.kernels.detector_refinement import DetectorSpots, start_geometry
    from ssx_mpi.kernels.still_simulation import random_rotation
    from ssx_mpi.simulation.detector import header_detector, true_detector
    from ssx_mpi.simulation.simulation_parameters import BeamParameters, DetectorParameters, HeaderParameters
    from ssx_mpi.stages.fast.panel_tree import frame_of, panel_tree

    rng = np.random.default_rng(seed)
    header = HeaderParameters(panel_shift_mm=0.1, panel_tilt_deg=0.1)
    true = true_detector(DetectorParameters("cspad", 100.0), BeamParameters(), header, rng)
    panels, expected = (
        np.array([frame_of(panel) for panel in each.to_dxtbx()]) for each in (true, header_detector(true, header))
    )
    size = np.array(true.to_dxtbx()[0].get_image_size_mm())
    s0 = np.array([0.0, 0.0, -1 / 0.976])
    inverse = np.linalg.inv(panels)
    grid = np.stack(np.meshgrid(*[np.arange(-26, 27)] * 3), -1).reshape(-1, 3).astype(float)
    a_matrices, hkl, crystal, panel, xy = [], [], [], [], []
    for k in range(n_crystals):
        a = random_rotation(rng) @ np.diag([1 / 79.1, 1 / 79.1, 1 / 38.2])
        q = grid @ a.T
        length = np.linalg.norm(s0 + q, axis=1)
        near = np.flatnonzero((np.abs(length - 1 / 0.976) < 2e-4) & (np.linalg.norm(q, axis=1) < 0.5))
        near = rng.permutation(near)[:120]
        rays = (s0 + q[near]) / length[near, None]
        v = np.einsum("pij,nj->npi", inverse, rays)
        at = v[:, :, :2] / v[:, :, 2:]
        on = np.all((at > 0) & (at < size), axis=2) & (v[:, :, 2] > 0)
        row, number = np.nonzero(on)
        a_matrices.append(a)
        hkl.append(grid[near][row])
        panel.append(number)
        xy.append(at[row, number] + rng.normal(0, 0.01, (len(row), 2)))
        crystal.append(np.full(len(row), k))
    spots = DetectorSpots(*(np.concatenate(each) for each in (hkl, crystal, panel, xy)))
    middle = np.tile(size / 2, (len(panels), 1))
    start = start_geometry(expected, np.array(a_matrices), middle)
    detector = header_detector(true, header).to_dxtbx()
    tree = panel_tree(detector, PanelPriors())
    start = tree.with_levels(start, detector, tree.depth)
    strains = np.zeros((n_crystals, 2, 3, 3))
    for k, a in enumerate(a_matrices):
        u = a @ np.diag([79.1, 79.1, 38.2])
        strains[k, 0] = u @ np.diag([1.0, 1.0, 0.0]) @ u.T / np.sqrt(2)
        strains[k, 1] = u @ np.diag([0.0, 0.0, 1.0]) @ u.T
    return spots, start, strains, s0


def measure_size(n_crystals: int) -> None:
    """CPU-seconds and memory of a refinement, and its bits on one and four parties."""
    spots, start, strains, s0 = made_up(n_crystals)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    alone = refine_detector(spots, start, strains, s0)
    spent = time.process_time() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{n_crystals} crystals, {len(spots.hkl)} spots, 64 sensors: {spent:.1f} CPU-s, {len(alone.steps) - 1} steps, "
        f"converged: {alone.converged}, {(after - before) / 1024:.0f} MB more"
    )
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from fake_ranks import on_fake_ranks

    from ssx_mpi.kernels.detector_refinement import BLOCK, DetectorSpots

    def on(comm):
        own = (np.arange(n_crystals) // BLOCK) % comm.size == comm.rank
        mine, number = own[spots.crystal], np.cumsum(own) - 1
        part = DetectorSpots(
            *(spots.hkl[mine], number[spots.crystal[mine]], spots.panel[mine], spots.xy[mine], np.flatnonzero(own))
        )
        begin = replace(start, a_matrices=start.a_matrices[own])
        return refine_detector(part, begin, strains[own], s0, reducer=comm).geometry.panels.tobytes()

    same = all(each == alone.geometry.panels.tobytes() for each in on_fake_ranks(4, on))
    print(f"the same bits on 4 parties: {same}")


def measure_drift() -> None:
    """How well a drift is found, and how often one is claimed where there is none."""
    from ssx_mpi.kernels.drift import find_drift

    def found(seed: int, n: int, drift_mm: float):
        spots, start, strains, s0 = made_up(n, seed)
        position = (np.arange(n) + 0.5) / n
        moved = replace(spots, xy=spots.xy.copy())
        moved.xy[:, 0] += drift_mm * (position[spots.crystal] - 0.5)
        return find_drift(moved, refine_detector(moved, start, strains, s0).geometry, strains, s0, position)

    for n in (100, 400):
        claimed = sum(found(seed, n, 0.0) is not None for seed in range(10))
        print(f"{n} crystals: drifts claimed of 10 sets without one: {claimed}")
        ways = [found(seed, n, 0.06) for seed in range(5)]
        total = [1e3 * abs(way.shift[-1] - way.shift[0])[0] for way in ways if way is not None]
        print(f"{n} crystals that drift by 60 um: found {len(total)} of 5, {np.round(total, 1)} um")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "size", "drift"))
    parser.add_argument("argument", nargs="?")
    parser.add_argument("refined", nargs="?", type=Path)
    options = parser.parse_args()
    dials_compat.prepare()
    if options.what == "real":
        measure_real(Path(options.argument))
        if options.refined:
            measure_as_dials(Path(options.argument), options.refined)
    elif options.what == "size":
        measure_size(int(options.argument or 10_000))
    else:
        measure_drift()


if __name__ == "__main__":
    main()
