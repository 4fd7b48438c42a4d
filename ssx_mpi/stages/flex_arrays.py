"""Arrays of NumPy as those of DIALS and back, where flumpy has no word for it in every version.

An exception that passes while a temporary ``flumpy.from_numpy(...)`` is an argument ends the process, so every array is
bound to a name here, and ``tests/test_flumpy.py`` sees to it elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dials.array_family import flex
from dxtbx import flumpy


def to_miller_index(hkl: np.ndarray) -> Any:
    """``flex.miller_index`` of indices (n, 3)."""
    h, k, l = (flumpy.from_numpy(np.ascontiguousarray(hkl[:, column], dtype=np.int32)) for column in range(3))
    return flex.miller_index(h, k, l)


def from_miller_index(indices: Any) -> np.ndarray:
    """Indices (n, 3) int32 of a ``flex.miller_index``."""
    return indices.as_vec3_double().as_numpy_array().reshape(-1, 3).astype(np.int32)


def to_int6(boxes: np.ndarray) -> Any:
    """``flex.int6`` of bounding boxes (n, 6)."""
    columns = [flumpy.from_numpy(np.ascontiguousarray(boxes[:, column], dtype=np.int32)) for column in range(6)]
    return flex.int6(*columns)


def rows_of(table: Any, rows: np.ndarray) -> Any:
    """The rows of a reflection table with these numbers (n,), in this order."""
    chosen = flumpy.from_numpy(rows.astype(np.uint64))
    return table.select(chosen)
