"""Arrays are checked before their address is given to a compiled loop."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ssx_mpi.kernels._library import array, declare


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 3), np.float32), np.zeros(3), np.zeros((4, 6))[:, ::2], np.zeros((3, 2)).T, [[0.0, 1.0]], None],
    ids=["type", "dimensions", "stride", "order", "list", "none"],
)
def test_an_array_that_a_loop_would_misread_is_refused(wrong):
    with pytest.raises(TypeError):
        array(np.float64, 2).from_param(wrong)


def test_a_read_only_array_is_refused_for_output_alone():
    held = np.zeros((2, 3))
    held.flags.writeable = False
    with pytest.raises(TypeError):
        array(np.float64, 2, writeable=True).from_param(held)
    assert array(np.float64, 2).from_param(held).value == held.ctypes.data


@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_the_address_is_that_of_the_data(shape):
    given = np.zeros(shape)
    passed = array(np.float64, 2, writeable=True).from_param(given)
    assert ctypes.cast(passed, ctypes.c_void_p).value == given.ctypes.data


def test_a_library_built_from_older_sources_is_named():
    with pytest.raises(ImportError, match="older than the package"):
        declare("ssx_not_yet_there", [])
