"""Detectors of several panels: where rays land, what dxtbx makes of the master file, and what the truth says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.run_parameters import PanelPriors
from ssx_mpi.simulation.data_set import simulate
from ssx_mpi.simulation.detector import gap_mask, header_detector, true_detector
from ssx_mpi.simulation.simulation_parameters import (
    DETECTORS,
    BeamParameters,
    CrystalParameters,
    DetectorParameters,
    HeaderParameters,
    OutputParameters,
    SimulationError,
    SimulationParameters,
)
from ssx_mpi.stages.fast.panel_tree import panel_tree

PRESETS = ("jungfrau4m", "cspad", "agipd1m")


def made(preset: str, seed: int = 0, **header):
    parameters = HeaderParameters(**header)
    rng = np.random.default_rng(seed)
    true = true_detector(DetectorParameters(preset, 100.0), BeamParameters(), parameters, rng)
    return true, header_detector(true, parameters)


@pytest.mark.parametrize("preset", PRESETS)
def test_rays_land_where_dxtbx_says(preset):
    true, _ = made(preset, panel_shift_mm=0.2, panel_tilt_deg=0.3)
    detector = true.to_dxtbx()
    rng = np.random.default_rng(1)
    s1 = rng.normal(size=(400, 3)) * [0.4, 0.4, 0.02] + [0, 0, -1]
    s1 /= np.linalg.norm(s1, axis=1)[:, None] * 0.976
    found, module = true.pixels(s1), DETECTORS[preset].module
    landed = 0
    for ray, pixel in zip(s1, found):
        for number, panel in enumerate(detector):
            xy = np.array(panel.millimeter_to_pixel(panel.get_ray_intersection(tuple(ray))))
            # the middle of a panel, where no other one is near
            if np.all((xy > 5) & (xy < np.array(module) - 5)):
                assert pixel == pytest.approx(xy + true.preset.corner(number), abs=2e-3)
                landed += 1
    assert landed > 50
    nowhere = np.array([[0.0, 0.0, 1.0]])
    assert np.all(true.pixels(nowhere) < -1000), "nothing is recorded behind the sample"


def test_misplacements_have_the_widths_asked_for():
    true, header = made("cspad", panel_shift_mm=0.1, panel_tilt_deg=0.2)
    off = np.array([a.get_origin() for a in true.to_dxtbx()]) - [a.get_origin() for a in header.to_dxtbx()]
    assert np.std(off) == pytest.approx(0.1, rel=0.3)
    assert np.degrees(np.std(true.turn)) == pytest.approx(0.2, rel=0.2)
    same, _ = made("cspad")
    assert same.to_dxtbx() == header.to_dxtbx()


@pytest.mark.parametrize(("preset", "nodes"), [("jungfrau4m", (8,)), ("cspad", (4, 32, 64)), ("agipd1m", (4, 16))])
def test_dxtbx_reads_the_header_as_a_tree_of_panels(tmp_path, preset, nodes):
    from dxtbx.model.experiment_list import ExperimentListFactory

    parameters = SimulationParameters(
        n_images=1,
        hit_rate=1.0,
        seed=3,
        crystal=CrystalParameters(d_min=3.0),
        detector=DetectorParameters(preset, 100.0, noise=0.2),
        header=HeaderParameters((0.3, -0.2), 0.5, 0.1, 0.1),
        output=OutputParameters(tmp_path / "x.nxs", compression="gzip"),
    )
    simulate(parameters, SerialCommunicator())
    (experiment,) = ExperimentListFactory.from_filenames([str(tmp_path / "x.nxs")])
    read = experiment.detector
    _, header = made(preset, beam_offset_mm=(0.3, -0.2), distance_offset_mm=0.5)
    for panel, expected in zip(read, header.to_dxtbx()):
        for corner in ((0, 0), (*DETECTORS[preset].module,)):
            xy = tuple(np.array(corner) * DETECTORS[preset].pixel_mm)
            assert panel.get_lab_coord(xy) == pytest.approx(expected.get_lab_coord(xy), abs=1e-6)
    tree = panel_tree(read, PanelPriors())
    assert tuple(tree.node[level - 1].max() + 1 for level in tree.distinct) == nodes
    # pixels: floats with noise about their photons, chip edges and gaps masked
    raw = experiment.imageset.get_raw_data(0)
    assert len(raw) == DETECTORS[preset].n_modules
    pixels = np.concatenate([np.asarray(panel).ravel() for panel in raw])
    assert np.any((pixels < 0) & (pixels > -0.9)) and np.any(pixels > 5)
    assert not np.allclose(pixels, np.rint(pixels))
    assert json.loads((tmp_path / "truth.json").read_text())["parameters"]["header"]["panel_shift_mm"] == 0.1


def test_edges_of_chips_are_dead():
    mask = gap_mask(DETECTORS["jungfrau4m"])
    module = mask[:512, :1024]
    assert not module[0].all() and not module[:, 0].all()
    assert np.flatnonzero(module.all(axis=0)).tolist() == [255, 256, 511, 512, 767, 768]
    assert np.flatnonzero(module.all(axis=1)).tolist() == [255, 256]


def test_what_cannot_be_is_refused():
    with pytest.raises(SimulationError, match=r"header.panel_shift=0.1: detector.preset=eiger1m is one panel"):
        SimulationParameters(header=HeaderParameters(panel_shift_mm=0.1))
    with pytest.raises(SimulationError, match="written as nxs alone"):
        SimulationParameters(detector=DetectorParameters("cspad"), output=OutputParameters(format="cbf"))
    with pytest.raises(SimulationError, match="panel_tilt"):
        HeaderParameters(panel_tilt_deg=-1.0)


def test_the_detector_drifts_along_the_run():
    from ssx_mpi.simulation.still_images import Simulator

    parameters = SimulationParameters(n_images=11, detector=DetectorParameters(drift_mm=(0.06, -0.03)))
    simulator = Simulator(parameters)
    x0, y0 = simulator.detector_at(0).beam_centre_mm
    x1, y1 = simulator.detector_at(10).beam_centre_mm
    assert (x0 - x1, y0 - y1) == pytest.approx((0.06, -0.03))
    assert simulator.detector_at(0).beam_centre_mm == simulator.detector.beam_centre_mm
