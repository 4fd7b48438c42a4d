"""Simulated data sets on disk: dxtbx reads them, the header errs and the truth does not, ranks do not matter."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.simulation import nexus_writer
from ssx_mpi.simulation.data_set import outputs, simulate
from ssx_mpi.simulation.simulation_parameters import SimulationError, SimulationParameters
from ssx_mpi.simulation.still_images import Simulator
from ssx_mpi.simulation.truth import read_experiments

# dxtbx divides zero by zero where it looks for the step of an axis that does not turn
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def load(*paths):
    from dxtbx.model.experiment_list import ExperimentListFactory

    return ExperimentListFactory.from_filenames([str(p) for p in paths])


@pytest.mark.parametrize(
    "output",
    [
        {},
        {"compression": "gzip"},
        {"compression": "none"},
        {"compression": "lz4"},
        {"rotation_axis": True},
        {"format": "cbf"},
    ],
    ids=lambda output: " ".join(f"{k}={v}" for k, v in output.items()) or "default",
)
def test_dxtbx_reads_back_images_geometry_and_mask(small, tmp_path, output):
    parameters = small(output=output)
    simulate(parameters, SerialCommunicator())
    cbf = output.get("format") == "cbf"
    paths = [tmp_path / f"x_{i:05d}.cbf" for i in range(1, 6)] if cbf else [tmp_path / "x.nxs"]
    experiments = load(*paths)
    assert len(experiments) == 5
    simulator = Simulator(parameters)
    panel = experiments[0].detector[0]
    assert panel.get_beam_centre((0, 0, -1)) == pytest.approx(simulator.header.beam_centre_mm, abs=2e-5)
    assert panel.get_directed_distance() == pytest.approx(100.4, abs=1e-4)
    assert experiments[0].beam.get_wavelength() == pytest.approx(0.976)
    assert panel.get_thickness() == pytest.approx(0.32)
    for i, experiment in enumerate(experiments):
        still = experiment.scan is None or experiment.scan.get_oscillation()[1] == 0
        assert still
        image_set = experiment.imageset
        at = i if len(image_set) == 5 else 0
        counts, _ = simulator.image(i)
        assert np.array_equal(image_set.get_raw_data(at)[0].as_numpy_array(), counts)
        assert np.array_equal(~image_set.get_mask(at)[0].as_numpy_array(), simulator.dead)


def test_a_folder_can_be_moved_and_read_from_elsewhere(small, tmp_path, monkeypatch):
    simulate(small(output={"file": tmp_path / "a" / "x.nxs"}), SerialCommunicator())
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir("/")
    raw = load(tmp_path / "b" / "x.nxs")[4].imageset.get_raw_data(0)[0].as_numpy_array()
    assert raw.max() > 0
    assert np.array_equal(raw, Simulator(small()).image(4)[0])


@pytest.mark.parametrize("output", [{}, {"rotation_axis": True}, {"format": "cbf"}])
def test_truth_keeps_the_true_geometry_crystals_and_intensities(small, tmp_path, output):
    from cctbx import miller
    from iotbx import mtz

    parameters = small(output=output)
    truths = simulate(parameters, SerialCommunicator())
    lattices, geometry = read_experiments(tmp_path / "truth.expt")
    simulator = Simulator(parameters)
    assert geometry.beam_centre_mm == pytest.approx(simulator.detector.beam_centre_mm, abs=1e-9)
    assert geometry.distance_mm == pytest.approx(100.0)
    expected = [(t.index, lattice.A) for t in truths for lattice in t.lattices]
    assert [lattice.image for lattice in lattices] == [image for image, _ in expected]
    assert len(expected) >= 2
    for lattice, (_, A) in zip(lattices, expected):
        assert np.allclose(lattice.A, A)
    (array,) = mtz.object(str(tmp_path / "truth.mtz")).as_miller_arrays()
    assert array.is_xray_intensity_array()
    assert str(array.space_group_info()) == "P 43 21 2"
    table = dict(zip(map(tuple, simulator.structure.asu_hkl.tolist()), simulator.structure.asu_intensity))
    asu = miller.array(array, data=array.data()).map_to_asu()
    assert array.size() > 1000
    assert np.allclose([table[hkl] for hkl in asu.indices()], asu.data().as_numpy_array(), rtol=1e-5)
    record = json.loads((tmp_path / "truth.json").read_text())
    assert [image["lattices"] for image in record["images"]] == [len(t.lattices) for t in truths]
    assert record["parameters"]["header"]["beam_offset_mm"] == [0.3, -0.2]


def test_dials_opens_the_truth(small, tmp_path):
    from dxtbx.model import ExperimentList

    simulate(small(), SerialCommunicator())
    experiments = ExperimentList.from_file(str(tmp_path / "truth.expt"), check_format=True)
    crystal = experiments[0].crystal
    assert crystal.get_unit_cell().parameters()[:3] == pytest.approx((79.1, 79.1, 38.2), rel=0.01)
    assert len(set(experiments.identifiers())) == len(experiments)
    assert experiments[0].imageset.get_raw_data(0)[0].as_numpy_array().max() > 10


MPI = {
    **os.environ,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_mapby": ":oversubscribe",
}
PROGRAM = [sys.executable, "-m", "ssx_mpi.command_line.simulate"]
QUICK = [
    "n_images=5",
    "hit_rate=0.6",
    "d_min=3",
    "detector.preset=pilatus200k",
    "detector.distance=100",
    "output.images_per_file=2",
]


def digests(folder: Path) -> dict[str, str]:
    """The content of every file of a data set but the master, which bears the time of its making."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.suffix != ".nxs"
    }


@pytest.mark.parametrize(("suffix", "sizes"), [("nxs", (2, 3)), ("cbf", (2,))])
def test_same_seed_same_bytes_on_any_number_of_ranks(tmp_path, suffix, sizes):
    from ssx_mpi.command_line import simulate as program

    folder = tmp_path / "set"
    arguments = [*QUICK, f"output.file={folder / 'x'}.{suffix}"]
    assert program.main(arguments, SerialCommunicator()) == 0
    expected = digests(folder)
    assert len(expected) == (3 if suffix == "nxs" else 5) + 3
    for ranks in sizes:
        folder.rename(tmp_path / f"before{ranks}")
        done = subprocess.run(
            ["mpiexec", "-n", str(ranks), *PROGRAM, *arguments],
            env=MPI,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert f"on {ranks} ranks" in done.stdout
        assert digests(folder) == expected


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("unit_cell=79,70,38,90,90,90", "unit_cell=79,70,38,90,90,90"),
        ("space_group=P99", "space_group=P99"),
        ("hit_rate=1.5", "hit_rate=1.5"),
        ("detector.distance=-3", "detector.distance=-3"),
        ("d_min=0.3", "d_min=0.3"),
        ("no_such_thing=3", "no_such_thing"),
        ("detektor.preset=eiger4m", "did you mean detector.preset=?"),
        ("n_images=many", "n_images"),
        ("images.h5", "images.h5"),
        ("output.file=x.tiff", "output.file=x.tiff"),
        ("output.file=None", "output.file=None"),
        ("n_images=None", "n_images=None"),
        ("unit_cell=nan,79,38,90,90,90", "unit_cell=nan"),
    ],
)
def test_bad_parameters_get_one_line_and_exit_2(tmp_path, capsys, argument, named, monkeypatch):
    from ssx_mpi.command_line import simulate as program

    monkeypatch.chdir(tmp_path)
    try:
        status = program.main([*QUICK, argument], SerialCommunicator())
    except SystemExit as stop:
        status = stop.code
    message = capsys.readouterr().err
    assert status == 2
    assert named in message
    assert len([line for line in message.splitlines() if line.strip()]) <= 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    from ssx_mpi.command_line import simulate as program

    (tmp_path / "taken").write_text("a file of somebody")
    with pytest.raises(SystemExit) as left:
        program.main([*QUICK, f"output.file={tmp_path}/taken/x.nxs"], SerialCommunicator())
    said = capsys.readouterr().err.strip()
    assert left.value.code == 1
    assert "cannot be written: File exists" in said and len(said.splitlines()) == 1


def test_an_existing_data_set_is_not_written_over(tmp_path, capsys):
    from ssx_mpi.command_line import simulate as program

    arguments = [*QUICK, "n_images=1", f"output.file={tmp_path / 'x.nxs'}"]
    assert program.main(arguments, SerialCommunicator()) == 0
    before = digests(tmp_path)
    assert program.main([*arguments, "seed=9"], SerialCommunicator()) == 2
    assert "x.nxs exists already" in capsys.readouterr().err
    assert digests(tmp_path) == before
    assert program.main([*arguments, "seed=9", "output.overwrite=True"], SerialCommunicator()) == 0
    assert digests(tmp_path) != before


def test_a_missing_compression_filter_is_named_with_the_way_out(tmp_path, capsys, monkeypatch):
    from ssx_mpi.command_line import simulate as program

    monkeypatch.setattr(nexus_writer, "has_filter", lambda compression: compression == "gzip")
    arguments = [*QUICK, "n_images=1", f"output.file={tmp_path / 'x.nxs'}"]
    assert program.main(arguments, SerialCommunicator()) == 2
    message = capsys.readouterr().err
    assert "output.compression=bslz4" in message
    assert "gzip" in message
    assert list(tmp_path.iterdir()) == []
    assert program.main([*arguments, "output.compression=gzip"], SerialCommunicator()) == 0


def test_defaults_of_the_program_are_those_of_the_library():
    from ssx_mpi.command_line.simulate import read_arguments

    found, _ = read_arguments([])
    expected = SimulationParameters()
    for part in ("n_images", "seed", "hit_rate", "lattices", "crystal", "beam", "detector", "background", "header"):
        assert getattr(found, part) == getattr(expected, part)
    assert found.output.file == expected.output.file.absolute()
    assert (found.output.compression, found.output.images_per_file) == ("bslz4", 25)


def test_outputs_name_the_first_image_and_the_truth(small, tmp_path):
    names = [path.name for path in outputs(small(output={"file": tmp_path / "a_###.cbf", "format": "cbf"}))]
    assert names == ["a_001.cbf", "truth.expt", "truth.mtz", "truth.json"]


def test_no_images_is_refused():
    with pytest.raises(SimulationError, match="n_images=0"):
        SimulationParameters(n_images=0)
