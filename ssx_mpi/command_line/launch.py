"""ssx_mpi.launch: stands before mpirun or srun, so that requests to stop end the ranks in order.

  ssx_mpi.launch mpirun -n 64 ssx_mpi image=...

Imports nothing that is large, as :mod:`ssx_mpi.parallel.relay`, which does the work.
"""

from __future__ import annotations

import sys

from ssx_mpi.parallel import relay


def run() -> None:
    """Entry point of the program ``ssx_mpi.launch``."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("ssx_mpi.launch mpirun -n 64 ssx_mpi ...: has SIGTERM, SIGUSR1 and SIGUSR2 end the ranks in order")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    sys.exit(relay.main(sys.argv[1:]))


if __name__ == "__main__":
    run()
