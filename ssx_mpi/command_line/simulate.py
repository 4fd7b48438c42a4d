"""Program ssx_mpi.simulate: write a synthetic serial-crystallography data set with the truth beside it.

Examples::

  ssx_mpi.simulate n_images=200 output.file=lyso.nxs

  mpirun -n 4 ssx_mpi.simulate n_images=5000 hit_rate=0.1 space_group=P43212 unit_cell=79.1,79.1,38.2,90,90,90 \\
      header.beam_offset=0.3,-0.2 header.distance_offset=0.4 seed=7 output.file=chip/lyso.nxs

  ssx_mpi.simulate n_images=50 detector.preset=pilatus6m detector.distance=250 output.file=stills/x_#####.cbf

Each image is a still of zero to three randomly oriented crystals on a background of air, solvent and water ring. The
truth stands beside the images: truth.expt (crystals, beam, detector), truth.mtz (merged intensities) and truth.json
(parameters, spots to be seen on each image). The same parameters give the same bytes on any number of ranks.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ssx_mpi import __version__, dials_compat
from ssx_mpi.command_line import parsing
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parallel.launching import guarded
from ssx_mpi.parameters.declaration import Definition
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.simulation.simulation_parameters import SimulationError, SimulationParameters

USAGE = "ssx_mpi.simulate [options] [name=value ...]"

DEFINITIONS = (
    Definition("n_images", "int", 200, "Number of images.", least=1),
    Definition("seed", "int", 1, "Seed of all random numbers; the number of ranks does not matter.", least=0),
    Definition("hit_rate", "float", 0.3, "Probability that an image has a crystal, 0 to 1."),
    Definition(
        "lattices", "floats", (0.85, 0.12, 0.03), "Relative frequencies of hits with one, two, three ... lattices."
    ),
    Definition("space_group", "str", "P43212", "Space group of the crystals."),
    Definition(
        "unit_cell", "floats", (79.1, 79.1, 38.2, 90.0, 90.0, 90.0), "Mean unit cell, angstrom and degrees.", size=6
    ),
    Definition("d_min", "float", 1.6, "Resolution to which reflections are drawn, angstrom."),
    Definition("crystal.b_factor", "float", 20.0, "Wilson B factor, square angstrom."),
    Definition(
        "crystal.cell_spread",
        "float",
        0.001,
        "Relative standard deviation of the free cell parameters from crystal to crystal.",
    ),
    Definition(
        "crystal.mosaicity",
        "float",
        0.05,
        "Median misorientation of the domains of a crystal, degrees (standard deviation).",
    ),
    Definition(
        "crystal.mosaicity_spread",
        "float",
        0.2,
        "Standard deviation of the logarithm of the mosaicity from crystal to crystal.",
        level=2,
    ),
    Definition("crystal.domain_size", "float", 2000.0, "Edge of the coherent domains, angstrom."),
    Definition(
        "crystal.brightness",
        "float",
        500.0,
        "Photons in a centred reflection of average intensity at zero angle, for the median crystal.",
    ),
    Definition(
        "crystal.brightness_spread",
        "float",
        1.1,
        "Standard deviation of the logarithm of the brightness from crystal to crystal.",
    ),
    Definition("beam.wavelength", "float", 0.976, "Angstrom."),
    Definition("beam.bandwidth", "float", 0.0001, "Relative standard deviation of the wavelength.", level=1),
    Definition("beam.divergence", "float", 5e-05, "Standard deviation of the direction of the beam, radians.", level=2),
    Definition(
        "beam.polarization_fraction", "float", 0.999, "Share of the intensity that is polarized horizontally.", level=2
    ),
    Definition(
        "beam.jitter",
        "float",
        0.0,
        "Relative standard deviation of the wavelength from shot to shot, as at an XFEL; each is in the header.",
        level=1,
    ),
    Definition(
        "detector.preset",
        "choice",
        "eiger1m",
        "Modules, gaps and pixels. The last three are trees of panels.",
        choices=("eiger1m", "eiger4m", "pilatus6m", "pilatus200k", "jungfrau4m", "cspad", "agipd1m"),
    ),
    Definition("detector.distance", "float", 70.0, "True distance, mm."),
    Definition(
        "detector.centre_offset",
        "floats",
        (0.6, -0.9),
        "Where the beam truly meets the detector, x,y in mm from its middle.",
        size=2,
    ),
    Definition("detector.bad_pixels", "int", 60, "Number of pixels flagged as bad.", level=2),
    Definition(
        "detector.point_spread", "float", 0.45, "Blur by sensor and beam size, standard deviation in pixels.", level=2
    ),
    Definition(
        "detector.noise",
        "float",
        0.0,
        "Standard deviation of the readout in photons: above 0 the pixels are calibrated floats, some below zero.",
        level=1,
    ),
    Definition(
        "detector.drift",
        "floats",
        (0.0, 0.0),
        "How far the detector moves from the first image to the last, evenly, x,y in mm.",
        level=1,
        size=2,
    ),
    Definition("background.level", "float", 3.0, "Counts per pixel on the water ring."),
    Definition(
        "background.spread",
        "float",
        0.15,
        "Standard deviation of the logarithm of the level from image to image.",
        level=1,
    ),
    Definition("background.ring_d", "float", 3.2, "Resolution of the water ring, angstrom.", level=1),
    Definition(
        "background.beamstop",
        "float",
        1.5,
        "Radius of the shadow of the beamstop on the detector, mm; 0 for none.",
        level=1,
    ),
    Definition(
        "header.beam_offset",
        "floats",
        (0.0, 0.0),
        "Error of the beam centre in the header, x,y in mm: header minus truth.",
        size=2,
    ),
    Definition("header.distance_offset", "float", 0.0, "Error of the distance in the header, mm: header minus truth."),
    Definition(
        "header.panel_shift",
        "float",
        0.0,
        "Standard deviation of the shifts of the panels against the header, along each axis, mm.",
    ),
    Definition(
        "header.panel_tilt",
        "float",
        0.0,
        "Standard deviation of the turns of the panels against the header, about each axis, degrees.",
    ),
    Definition(
        "output.file",
        "path",
        "simulated.nxs",
        "Master file NAME.nxs, with data files NAME_000001.h5 ..., or NAME.cbf for NAME_00001.cbf ... "
        "(NAME_###.cbf sets the digits). The truth goes into the same folder.",
    ),
    Definition(
        "output.format",
        "choice",
        "auto",
        "auto: cbf for a file that ends so, otherwise NeXus.",
        choices=("auto", "nxs", "cbf"),
    ),
    Definition(
        "output.compression", "choice", "bslz4", "Of NeXus data files.", choices=("bslz4", "lz4", "gzip", "none")
    ),
    Definition("output.images_per_file", "int", 25, "Images in each NeXus data file, whatever the number of ranks."),
    Definition(
        "output.rotation_axis",
        "bool",
        False,
        "Write a rotation axis that never turns, as some beamlines do; dxtbx then opens one sequence of stills.",
        level=2,
    ),
    Definition("output.overwrite", "bool", False, "Write over a data set that is there already."),
)


def parameters_from_phil(params: Any) -> SimulationParameters:
    """The PHIL parameters as a :class:`~ssx_mpi.simulation.simulation_parameters.SimulationParameters`.

    Raises
    ------
    SimulationError
        For a value that cannot be simulated.
    """
    from ssx_mpi.simulation import simulation_parameters as p

    c, b, g, d, h, o = (
        params.crystal,
        params.beam,
        params.background,
        params.detector,
        params.header,
        params.output,
    )
    file = Path(o.file).absolute()
    output_format = o.format if o.format != "auto" else ("cbf" if file.suffix == ".cbf" else "nxs")
    if output_format == "nxs" and file.suffix not in (".nxs", ".h5"):
        raise p.SimulationError(f"output.file={o.file}: a NeXus master ends in .nxs or .h5")
    return p.SimulationParameters(
        n_images=params.n_images,
        seed=params.seed,
        hit_rate=params.hit_rate,
        lattices=tuple(params.lattices),
        crystal=p.CrystalParameters(
            space_group=params.space_group,
            unit_cell=tuple(params.unit_cell),
            d_min=params.d_min,
            b_factor=c.b_factor,
            cell_spread=c.cell_spread,
            mosaicity_deg=c.mosaicity,
            mosaicity_spread=c.mosaicity_spread,
            domain_size=c.domain_size,
            brightness=c.brightness,
            brightness_spread=c.brightness_spread,
        ),
        beam=p.BeamParameters(b.wavelength, b.bandwidth, b.divergence, b.polarization_fraction, b.jitter),
        background=p.BackgroundParameters(g.level, g.spread, g.ring_d, g.beamstop),
        detector=p.DetectorParameters(
            d.preset, d.distance, tuple(d.centre_offset), d.bad_pixels, d.point_spread, d.noise, tuple(d.drift)
        ),
        header=p.HeaderParameters(tuple(h.beam_offset), h.distance_offset, h.panel_shift, h.panel_tilt),
        output=p.OutputParameters(file, output_format, o.compression, o.images_per_file, o.rotation_axis),
    )


def read_arguments(args: list[str]) -> tuple[SimulationParameters, bool]:
    """The parameters on a command line, and whether to write over a data set.

    Raises
    ------
    InputError
        For an unknown parameter, or one with an impossible value.
    SimulationError
        For a value that cannot be simulated.
    """
    given = parsing.parse(parsing.Program(USAGE, DEFINITIONS, "parameters are given as name=value", __doc__), args)
    return parameters_from_phil(given.extract), given.extract.output.overwrite


def main(args: list[str], comm: Communicator) -> int:
    """Parse, simulate on every rank of `comm`, report on rank 0; returns the exit status."""
    from ssx_mpi.simulation.crystal import crystal_symmetry
    from ssx_mpi.simulation.data_set import check_outputs, simulate

    if "--version" in args:
        if comm.rank == 0:
            print(f"ssx_mpi {__version__}")
        return ExitCode.DONE
    parameters, refusal = None, None
    try:
        parameters, overwrite = read_arguments(args)
        crystal_symmetry(parameters.crystal)
        check_outputs(parameters, overwrite)
    except (SimulationError, InputError) as error:
        refusal = str(error)
    # all ranks have looked before one of them writes, or leaves
    refusals = [message for message in comm.allgather(refusal) if message]
    if parameters is None or refusals:
        if comm.rank == 0:
            print(f"ssx_mpi.simulate: {refusals[0]}", file=sys.stderr, flush=True)
        comm.barrier()
        return ExitCode.REFUSED
    started = time.perf_counter()
    try:
        truths = simulate(parameters, comm)
    except OSError as error:
        reason = str(error.strerror or error).splitlines()[0]
        print(f"ssx_mpi.simulate: {parameters.output.file} cannot be written: {reason}", file=sys.stderr, flush=True)
        comm.abort(1)
        return ExitCode.FAULT
    if truths is not None:
        hits = [t for t in truths if t.lattices]
        seconds = time.perf_counter() - started
        print(
            f"{parameters.output.file}: {len(truths)} images, {len(hits)} hits, "
            f"{sum(len(t.lattices) for t in hits)} lattices, "
            f"{sum(t.visible_spots >= 15 for t in hits)} hits with 15 visible spots or more; "
            f"{seconds:.1f} s, {len(truths) / seconds:.1f} images/s on {comm.size} ranks"
        )
    return ExitCode.DONE


def run() -> None:
    """Entry point of the program: on one process, or on the ranks that mpirun, mpiexec or srun started."""
    dials_compat.prepare()
    guarded(lambda comm: main(sys.argv[1:], comm))


if __name__ == "__main__":
    run()
