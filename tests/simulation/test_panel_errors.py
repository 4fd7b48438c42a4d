"""Errors of panels against the truth, and wavelengths of single shots."""

import numpy as np
import pytest

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.simulation.data_set import simulate
from ssx_mpi.simulation.detector import true_detector
from ssx_mpi.simulation.panel_errors import panel_errors, table_rows
from ssx_mpi.simulation.simulation_parameters import (
    BeamParameters,
    CrystalParameters,
    DetectorParameters,
    HeaderParameters,
    OutputParameters,
    SimulationParameters,
)
from ssx_mpi.simulation.still_images import Simulator
from ssx_mpi.simulation.truth import compare, load_truth, read_experiments, table


def misplaced(preset="cspad", shift=0.1, tilt=0.1):
    header = HeaderParameters(panel_shift_mm=shift, panel_tilt_deg=tilt)
    return true_detector(DetectorParameters(preset, 120.0), BeamParameters(), header, np.random.default_rng(1))


def test_errors_are_the_motions_that_were_made():
    made = misplaced()
    true, header = made.to_dxtbx(), misplaced(shift=0, tilt=0).to_dxtbx()
    same = panel_errors(true, true)
    assert max(map(max, (same.in_plane_mm, same.tilt_deg, np.abs(same.turn_deg)))) < 1e-9
    found = panel_errors(true, header)
    # but for the common turn, some thousandths of a degree here
    assert found.in_plane_mm == pytest.approx(np.hypot(*made.shift_mm[:, :2].T), abs=0.02)
    assert found.along_beam_mm == pytest.approx(-made.shift_mm[:, 2], abs=1e-3)
    assert found.tilt_deg == pytest.approx(np.degrees(np.hypot(*made.turn[:, :2].T)), abs=1e-3)
    turns = found.turn_deg + np.degrees(made.turn[:, 2])
    assert turns == pytest.approx(np.full(64, turns.mean()), abs=1e-3)
    with pytest.raises(ValueError, match="8 panels instead of 64"):
        panel_errors(true, misplaced("jungfrau4m").to_dxtbx())


def test_a_turn_about_the_beam_is_no_error_and_a_shift_is():
    true, turned, shifted = (misplaced().to_dxtbx() for _ in range(3))
    c, s = np.cos(2e-3), np.sin(2e-3)
    turned.hierarchy().set_local_frame((c, s, 0), (-s, c, 0), (0, 0, 0))
    shifted.hierarchy().set_local_frame((1, 0, 0), (0, 1, 0), (0.05, 0, -0.2))
    found = panel_errors(true, turned)
    assert max(found.in_plane_mm) < 1e-9 and np.abs(found.turn_deg).max() < 1e-9
    found = panel_errors(true, shifted)
    assert found.shift_mm == pytest.approx((0.05, 0, -0.2), abs=1e-9)
    assert "median 50.0" in dict(table_rows(found))["panels: errors in their planes"]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_wavelengths_of_shots_and_a_moving_detector_are_in_header_and_truth(tmp_path):
    from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory

    parameters = SimulationParameters(
        n_images=2,
        hit_rate=1.0,
        seed=3,
        crystal=CrystalParameters(d_min=3.0),
        beam=BeamParameters(1.2, jitter=1e-3),
        detector=DetectorParameters("jungfrau4m", 100.0, drift_mm=(0.06, 0.0)),
        header=HeaderParameters(panel_shift_mm=0.1),
        output=OutputParameters(tmp_path / "x.nxs", compression="gzip"),
    )
    truths = simulate(parameters, SerialCommunicator())
    simulator = Simulator(parameters)
    experiments = ExperimentListFactory.from_filenames([str(tmp_path / "x.nxs")])
    shots = [experiment.beam.get_wavelength() for experiment in experiments]
    assert shots == pytest.approx([simulator.wavelength(0), simulator.wavelength(1)], rel=1e-6)
    assert abs(shots[0] / shots[1] - 1) > 1e-5
    true = ExperimentList.from_file(str(tmp_path / "truth.expt"), check_format=False)
    assert true[0].beam.get_wavelength() == pytest.approx(simulator.wavelength(truths[0].index))
    first, last = (true[k].detector[0].get_origin() for k in (0, len(true) - 1))
    assert last[0] - first[0] == pytest.approx(0.06)
    # rays of the image follow its own wavelength
    lattice = truths[1].lattices[0]
    spots = simulator.spots(lattice.A, lattice.mosaicity_deg, shots[1])
    assert np.linalg.norm(spots.s1, axis=1) == pytest.approx(1 / shots[1])
    # the comparison of the truth with itself has panels
    lattices, geometry = read_experiments(tmp_path / "truth.expt")
    compared = compare(load_truth(tmp_path), lattices, geometry, None)
    assert compared.false_lattices == 0 and max(compared.panels.in_plane_mm) == 0
    assert compared.distance_error_mm == 0 and "panels: errors in their planes" in table(compared)
