"""Runs a script or, after -m, a module on this rank, once MPI is found to connect as many ranks as were asked for."""

import runpy
import sys

from mpi4py import MPI

wanted, target, *arguments = sys.argv[1:]
if MPI.COMM_WORLD.size != int(wanted):
    sys.exit(f"{wanted} ranks were asked for, and MPI connects {MPI.COMM_WORLD.size}")
if target == "-m":
    module, *arguments = arguments
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
else:
    sys.argv = [target, *arguments]
    runpy.run_path(target, run_name="__main__")
