"""The only place that imports mpi4py: communicator, dispatch of work, reductions, error abort."""
