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

import difflib
import re
import sys
import time
from pathlib import Path

from ssx_mpi import __version__, dials_compat
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel.launching import guarded

PHIL = """
n_images = 200
  .type = int(value_min=1)
  .help = "Number of images."
seed = 1
  .type = int(value_min=0)
  .help = "Seed of all random numbers; the number of ranks does not matter."
space_group = P43212
  .type = str
  .help = "Space group of the crystals."
unit_cell = 79.1,79.1,38.2,90,90,90
  .type = floats(size=6)
  .help = "Mean unit cell, angstrom and degrees."
d_min = 1.6
  .type = float
  .help = "Resolution to which reflections are drawn, angstrom."
hit_rate = 0.3
  .type = float
  .help = "Probability that an image has a crystal, 0 to 1."
lattices = 0.85,0.12,0.03
  .type = floats
  .help = "Relative frequencies of hits with one, two, three ... lattices."
crystal {
  b_factor = 20
    .type = float
    .help = "Wilson B factor, square angstrom."
  cell_spread = 0.001
    .type = float
    .help = "Relative standard deviation of the free cell parameters from crystal to crystal."
  mosaicity = 0.05
    .type = float
    .help = "Median misorientation of the domains of a crystal, degrees (standard deviation)."
  mosaicity_spread = 0.2
    .type = float
    .help = "Standard deviation of the logarithm of the mosaicity from crystal to crystal."
    .expert_level = 1
  domain_size = 2000
    .type = float
    .help = "Edge of the coherent domains, angstrom."
  brightness = 500
    .type = float
    .help = "Photons in a centred reflection of average intensity at zero angle, for the median crystal."
  brightness_spread = 1.1
    .type = float
    .help = "Standard deviation of the logarithm of the brightness from crystal to crystal."
}
beam {
  wavelength = 0.976
    .type = float
    .help = "Angstrom."
  bandwidth = 1e-4
    .type = float
    .help = "Relative standard deviation of the wavelength."
    .expert_level = 1
  divergence = 5e-5
    .type = float
    .help = "Standard deviation of the direction of the beam, radians."
    .expert_level = 1
  polarization_fraction = 0.999
    .type = float
    .help = "Share of the intensity that is polarized horizontally."
    .expert_level = 1
  jitter = 0
    .type = float
    .help = "Relative standard deviation of the wavelength from shot to shot, as at an XFEL; each is in the header."
    .expert_level = 1
}
background {
  level = 3
    .type = float
    .help = "Counts per pixel on the water ring."
  spread = 0.15
    .type = float
    .help = "Standard deviation of the logarithm of the level from image to image."
    .expert_level = 1
  ring_d = 3.2
    .type = float
    .help = "Resolution of the water ring, angstrom."
    .expert_level = 1
  beamstop = 1.5
    .type = float
    .help = "Radius of the shadow of the beamstop on the detector, mm; 0 for none."
    .expert_level = 1
}
detector {
  preset = *eiger1m eiger4m pilatus6m pilatus200k jungfrau4m cspad agipd1m
    .type = choice
    .help = "Modules, gaps and pixels. The last three are trees of panels."
  distance = 70
    .type = float
    .help = "True distance, mm."
  centre_offset = 0.6,-0.9
    .type = floats(size=2)
    .help = "Where the beam truly meets the detector, x,y in mm from its middle."
  bad_pixels = 60
    .type = int
    .help = "Number of pixels flagged as bad."
    .expert_level = 1
  point_spread = 0.45
    .type = float
    .help = "Blur by sensor and beam size, standard deviation in pixels."
    .expert_level = 1
  noise = 0
    .type = float
    .help = "Standard deviation of the readout in photons: above 0 the pixels are calibrated floats, some below zero."
    .expert_level = 1
  drift = 0,0
    .type = floats(size=2)
    .help = "How far the detector moves from the first image to the last, evenly, x,y in mm."
    .expert_level = 1
}
header {
  beam_offset = 0,0
    .type = floats(size=2)
    .help = "Error of the beam centre in the header, x,y in mm: header minus truth."
  distance_offset = 0
    .type = float
    .help = "Error of the distance in the header, mm: header minus truth."
  panel_shift = 0
    .type = float
    .help = "Standard deviation of the shifts of the panels against the header, along each axis, mm."
  panel_tilt = 0
    .type = float
    .help = "Standard deviation of the turns of the panels against the header, about each axis, degrees."
}
output {
  file = simulated.nxs
    .type = path
    .help = "Master file NAME.nxs, with data files NAME_000001.h5 ..., or NAME.cbf for NAME_00001.cbf ..."
            "(NAME_###.cbf sets the digits). The truth goes into the same folder."
  format = *auto nxs cbf
    .type = choice
    .help = "auto: cbf for a file that ends so, otherwise NeXus."
  compression = *bslz4 lz4 gzip none
    .type = choice
    .help = "Of NeXus data files."
  images_per_file = 25
    .type = int
    .help = "Images in each NeXus data file, whatever the number of ranks."
  rotation_axis = False
    .type = bool
    .help = "Write a rotation axis that never turns, as some beamlines do; dxtbx then opens one sequence of stills."
    .expert_level = 1
  overwrite = False
    .type = bool
    .help = "Write over a data set that is there already."
}
"""


def parameters_from_phil(params):
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


def closest_name(message: str, scope) -> str:
    """The parameter of `scope` that an unknown one was perhaps meant to be, as the end of a sentence; empty if none."""
    unknown = re.search(r"Unknown command line parameter definition: ([\w.]+)", message)
    if not unknown:
        return ""
    names = [definition.path for definition in scope.all_definitions()]
    by_last = {name.split(".")[-1]: name for name in names}
    word = unknown.group(1)
    close = difflib.get_close_matches(word, names, 1) or difflib.get_close_matches(word.split(".")[-1], by_last, 1)
    return f" (did you mean {by_last.get(close[0], close[0])}?)" if close else ""


def main(args: list[str], comm) -> int:
    """Parse, simulate on every rank of `comm`, report on rank 0; returns the exit status."""
    from libtbx.phil import parse
    from libtbx.utils import Sorry

    from ssx_mpi.parameters.user_input import InputError, as_phil, check_values
    from ssx_mpi.simulation.crystal import crystal_symmetry
    from ssx_mpi.simulation.data_set import check_outputs, simulate
    from ssx_mpi.simulation.simulation_parameters import SimulationError

    if "--version" in args:
        if comm.rank == 0:
            print(f"ssx_mpi {__version__}")
        return ExitCode.DONE
    scope = parse(PHIL)
    usage = "ssx_mpi.simulate [options] [name=value ...]"
    parser = dials_compat.argument_parser(usage=usage, phil=scope, epilog=__doc__)
    parameters, refusal = None, None
    try:
        params, _ = parser.parse_args(args=[as_phil(each, scope) for each in args], show_diff_phil=False)
        check_values(params, scope)
        parameters = parameters_from_phil(params)
        crystal_symmetry(parameters.crystal)
        check_outputs(parameters, params.output.overwrite)
    except (SimulationError, InputError) as error:
        refusal = str(error)
    except (Sorry, RuntimeError) as error:
        # libtbx's way to say that it cannot read an argument
        refusal = " ".join(str(error).split()) + closest_name(str(error), scope)
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
