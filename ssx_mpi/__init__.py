"""Serial crystallography stills to merged intensities, over any number of MPI ranks."""

import os

__version__ = "0.1.0"

# One rank is one core. NumPy and SciPy read these when they are loaded, so they are set before anything else is
# imported; and they are not left to the environment, since sums over several threads end in other last digits.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = "1"
