"""A free set of reflections for cross-validation: the same for all reflections that the lattice has alike.

Where crystals may be twinned, or the space group turns out to be higher, a reflection that another of the free set is
bound to by the symmetry of the lattice must be free as well, or it is no test of anything. So what is drawn are
classes under the rotations of the lattice, a twentieth of them in each thin shell of resolution. The draw depends on
the indices and the cell alone: the same in every run, on any number of ranks.

References
----------
Brünger (1992). Nature 355, 472. Fabiola, Korostelev & Chapman (2006). Acta Cryst. D62, 227: symmetry of the lattice.
"""

from __future__ import annotations

import numpy as np

from ssx_mpi.kernels.merging import scramble
from ssx_mpi.kernels.reflections import UniqueReflections, asu_keys

#: flags run from 0, the free set by CCP4's convention, to this minus 1: 5% each
N_FLAGS = 20
_STREAM = 30_000


def new_flags(unique: UniqueReflections, settings: np.ndarray) -> np.ndarray:
    """Flags (n_unique,) int32 from 0 to 19 of new free sets.

    Parameters
    ----------
    settings
        (n_settings, 3, 3) of the lattice, see :func:`ssx_mpi.stages.intensities.reflection_data.reindexing_settings`.
    """
    rotations = np.concatenate([setting @ unique.rotations for setting in settings])
    key, _ = asu_keys(unique.hkl, rotations)
    _, first, of_class = np.unique(key, return_index=True, return_inverse=True)
    # neighbours in resolution, twenty at a time, get one flag each
    order = np.lexsort((key[first], np.round(unique.d_star_sq[first], 9)))
    flags = np.empty(len(first), dtype=np.int32)
    for begin in range(0, len(order), N_FLAGS):
        block = order[begin : begin + N_FLAGS]
        drawn = np.argsort(scramble(np.arange(N_FLAGS, dtype=np.int64) + begin, _STREAM), kind="stable")
        flags[block] = drawn[: len(block)]
    return flags[of_class.reshape(-1)]
