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

from ssx_mpi import __version__, dials_compat
from ssx_mpi.command_line import parsing
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parallel.launching import guarded
from ssx_mpi.parameters import declaration
from ssx_mpi.parameters.declaration import Definition
from ssx_mpi.parameters.user_input import InputError, PathReader
from ssx_mpi.simulation.simulation_parameters import SimulationError, SimulationParameters

USAGE = "ssx_mpi.simulate [options] [name=value ...]"

#: what this program has besides the parameters of the simulation
OVERWRITE = Definition("output.overwrite", "bool", False, "Write over a data set that is there already.")


def definitions() -> list[Definition]:
    """All parameters of this program."""
    return [*declaration.definitions(SimulationParameters), OVERWRITE]


def read_arguments(args: list[str]) -> tuple[SimulationParameters, bool]:
    """The parameters on a command line, and whether to write over a data set.

    Raises
    ------
    InputError
        For an unknown parameter, or one with an impossible value.
    SimulationError
        For a value that cannot be simulated.
    """
    given = parsing.parse(parsing.Program(USAGE, definitions(), "parameters are given as name=value", __doc__), args)
    parameters = declaration.read(SimulationParameters, given.extract, PathReader(Path.cwd()))
    return parameters, given.extract.output.overwrite


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
