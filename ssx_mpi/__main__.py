"""``python -m ssx_mpi`` is the program ``ssx_mpi``."""

from ssx_mpi.command_line.process import run

if __name__ == "__main__":
    run()
