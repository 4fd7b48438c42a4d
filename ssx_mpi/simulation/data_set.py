"""A simulated data set written by all ranks: images by whoever is next, master and truth by rank 0.

Which file holds which image, and every random number, follow from the parameters alone; the ranks only share the files
out. Truth grows with the number of crystals and is gathered on rank 0, which is fit for simulations, not for real runs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.simulation import cbf_writer, nexus_writer
from ssx_mpi.simulation.simulation_parameters import SimulationError, SimulationParameters
from ssx_mpi.simulation.still_images import ImageTruth, Simulator


def outputs(parameters: SimulationParameters) -> list[Path]:
    """The files that say that this data set exists: the master or first image, and the truth."""
    output = parameters.output
    first = output.file if output.format == "nxs" else cbf_writer.cbf_path(output.file, 0)
    return [first, *(output.file.parent / name for name in ("truth.expt", "truth.mtz", "truth.json"))]


def simulate(parameters: SimulationParameters, comm: Communicator) -> list[ImageTruth] | None:
    """Write the images, the master and the truth; collective.

    Returns
    -------
    list of ImageTruth or None
        On rank 0 the truth of all images in their order, elsewhere None.
    """
    structure = Simulator(parameters).structure if comm.rank == 0 else None
    simulator = Simulator(parameters, comm.bcast(structure))
    if comm.rank == 0:
        parameters.output.file.parent.mkdir(parents=True, exist_ok=True)
    comm.barrier()
    truths = _write_images(simulator, comm.rank, comm.size)
    gathered = comm.gather(truths)
    if gathered is None:
        comm.barrier()
        return None
    everything = sorted((truth for part in gathered for truth in part), key=lambda truth: truth.index)
    if parameters.output.format == "nxs":
        nexus_writer.write_master(
            *(_layout(parameters), simulator.header, simulator.gaps, simulator.bad),
            *(parameters.output.rotation_axis, parameters.detector.noise > 0),
            np.array([simulator.wavelength(k) for k in range(parameters.n_images)]) if parameters.beam.jitter else None,
        )
    write_truth(simulator, everything)
    comm.barrier()
    return everything


def _layout(parameters: SimulationParameters) -> nexus_writer.Layout:
    return nexus_writer.Layout(parameters.output.file, parameters.n_images, parameters.output.images_per_file)


def _write_images(simulator: Simulator, rank: int, size: int) -> list[ImageTruth]:
    parameters = simulator.parameters
    output = parameters.output
    truths: list[ImageTruth] = []
    if output.format == "cbf":
        for index in range(rank, parameters.n_images, size):
            counts, truth = simulator.image(index)
            cbf_writer.write_cbf(cbf_writer.cbf_path(output.file, index), counts, simulator.header)
            truths.append(truth)
        return truths

    def images(indices: range):
        for index in indices:
            counts, truth = simulator.image(index)
            truths.append(truth)
            yield counts

    layout = _layout(parameters)
    for number in range(rank, layout.n_files, size):
        nexus_writer.write_data_file(
            layout,
            number,
            images(layout.images(number)),
            simulator.detector.preset.shape,
            nexus_writer.pixel_type(simulator.detector.preset.bit_depth, parameters.detector.noise > 0),
            output.compression,
        )
    return truths


def write_truth(simulator: Simulator, truths: list[ImageTruth]) -> None:
    """Write ``truth.expt``, ``truth.mtz`` and ``truth.json`` beside the images."""
    folder = simulator.parameters.output.file.parent
    # newer versions of DIALS write down when and by whom, too: the same data set would not be the same bytes
    experiments = _experiments(simulator, truths).to_dict()
    experiments.pop("history", None)
    (folder / "truth.expt").write_text(json.dumps(experiments, indent=1))
    write_truth_mtz(simulator, folder / "truth.mtz")
    parameters = dataclasses.asdict(simulator.parameters)
    # the path would make the same data set differ from folder to folder
    parameters["output"]["file"] = simulator.parameters.output.file.name
    record = {
        "parameters": parameters,
        "images": [
            {"index": t.index, "lattices": len(t.lattices), "visible_spots": [l.visible_spots for l in t.lattices]}
            for t in truths
        ],
    }
    (folder / "truth.json").write_text(json.dumps(record, indent=1) + "\n")


def _experiments(simulator: Simulator, truths: list[ImageTruth]):
    """One experiment per lattice in the order of the images, each pointing at its image."""
    from dxtbx import model
    from scitbx import matrix

    def beam_of(wavelength: float):
        beam = model.BeamFactory.make_beam(sample_to_source=(0, 0, 1), wavelength=wavelength)
        beam.set_polarization_fraction(simulator.parameters.beam.polarization_fraction)
        beam.set_polarization_normal((0, 1, 0))
        return beam

    jitter, drift = simulator.parameters.beam.jitter, any(simulator.parameters.detector.drift_mm)
    beam, detector = beam_of(simulator.parameters.beam.wavelength), simulator.detector.to_dxtbx()
    group = simulator.structure.symmetry.space_group()
    hits = [truth for truth in truths if truth.lattices]
    sets = _image_sets(simulator.parameters, [truth.index for truth in hits])
    experiments: Any = model.ExperimentList()
    experiment_type: Any = model.Experiment
    for truth in hits:
        image_set = sets[truth.index]
        own_beam = beam_of(simulator.wavelength(truth.index)) if jitter else beam
        own_detector = simulator.detector_at(truth.index).to_dxtbx() if drift else detector
        for n, lattice in enumerate(truth.lattices):
            crystal = model.Crystal(matrix.sqr(lattice.A.ravel()), group)
            experiments.append(
                experiment_type(
                    beam=own_beam,
                    detector=own_detector,
                    crystal=crystal,
                    imageset=image_set,
                    scan=image_set.get_scan(),
                    goniometer=image_set.get_goniometer(),
                    identifier=f"truth-{truth.index:07d}-{n}",
                )
            )
    return experiments


def _image_sets(parameters: SimulationParameters, indices: list[int]) -> dict:
    """For each image index the dxtbx image set of that image alone."""
    from dxtbx.model.experiment_list import ExperimentListFactory

    def opened(file: Path) -> list:
        experiments: Any = ExperimentListFactory.from_filenames([str(file)])
        return experiments.imagesets()

    output = parameters.output
    if output.format == "cbf":
        return {i: opened(cbf_writer.cbf_path(output.file, i))[0] for i in indices}
    image_sets = opened(output.file)
    if output.rotation_axis:
        return {i: image_sets[0][i : i + 1] for i in indices}
    return {i: image_sets[i] for i in indices}


def write_truth_mtz(simulator: Simulator, path: Path) -> None:
    """Write the true intensities, with Friedel mates apart where atoms scatter anomalously."""
    from cctbx import crystal, miller
    from cctbx.array_family import flex

    from ssx_mpi.stages.flex_arrays import to_miller_index

    structure, p = simulator.structure, simulator.parameters.crystal
    inside = structure.symmetry.unit_cell().d(to_miller_index(structure.asu_hkl)).as_numpy_array() >= p.d_min
    symmetry = crystal.symmetry(unit_cell=structure.symmetry.unit_cell(), space_group=structure.symmetry.space_group())
    intensity = structure.asu_intensity[inside]
    # the truth has no error; one per cent keeps programs content that divide by it
    sigma = 0.01 * np.maximum(intensity, intensity.mean() * 1e-3)

    def array(hkl: np.ndarray, values: np.ndarray, sigmas: np.ndarray, anomalous: bool):
        indices = miller.set(symmetry, to_miller_index(hkl), anomalous_flag=anomalous)
        data = miller.array(indices, data=flex.double(values.tolist()), sigmas=flex.double(sigmas.tolist()))
        return data.set_observation_type_xray_intensity()

    hkl = structure.asu_hkl[inside]
    dataset = array(hkl, intensity, sigma, False).as_mtz_dataset(
        column_root_label="I", wavelength=simulator.parameters.beam.wavelength
    )
    if simulator.parameters.anomalous.element:
        half = 0.5 * structure.asu_difference[inside]
        # a centric reflection and its mate are one
        acentric = ~miller.set(symmetry, to_miller_index(hkl)).centric_flags().data().as_numpy_array()
        both = np.concatenate([hkl, -hkl[acentric]])
        values = np.concatenate([intensity + half, (intensity - half)[acentric]])
        mates = array(both, values, np.concatenate([sigma, sigma[acentric]]), True)
        dataset.add_miller_array(mates, column_root_label="I")
    dataset.mtz_object().write(str(path))
    # the MTZ library stamps each column with the time, and the same seed is to give the same bytes
    path.write_bytes(re.sub(rb"CREATED_[\d/]{10}_[\d:]{8}", b"CREATED_01/01/2000_00:00:00", path.read_bytes()))


def check_outputs(parameters: SimulationParameters, overwrite: bool) -> None:
    """Raise SimulationError when the output cannot be written, or another data set is there and not to be lost."""
    output = parameters.output
    if output.format == "nxs" and not nexus_writer.has_filter(output.compression):
        raise SimulationError(
            f"output.compression={output.compression}: this HDF5 has no such filter (pip install hdf5plugin); "
            "gzip and none always work"
        )
    for path in outputs(parameters):
        if path.exists() and not overwrite:
            raise SimulationError(f"{path} exists already: give another output.file, or output.overwrite=True")
