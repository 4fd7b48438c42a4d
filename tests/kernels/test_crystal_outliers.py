"""The likelihood that a crystal has the intensities of the others, on numbers that can be computed by hand."""

import numpy as np
import pytest

from ssx_mpi.kernels import crystal_outliers
from ssx_mpi.kernels.orientation import Predicted
from ssx_mpi.kernels.reflections import Observations
from ssx_mpi.kernels.scaling import Indexed, Noise, Scales


def test_it_is_the_ratio_of_two_normal_distributions():
    # two crystals of two reflections; the second has the intensities the wrong way round
    intensity = np.array([1.0, 3.0, 3.0, 1.0])
    observations = Observations(
        np.array([0, 2, 4]), np.zeros((4, 3), np.int32), intensity, np.full(4, 0.25), np.zeros(4, np.float32)
    )
    data = Indexed(
        observations, np.full(2, 0.04), np.array([0, 1, 0, 1], np.int32), np.zeros(4, np.uint8), np.ones(2, bool)
    )
    predicted = Predicted(np.array([1.0, 3.0, 1.0, 3.0]), np.full(4, 0.25))
    mean = np.full(2, 2.0)
    found = crystal_outliers.belonging(data, Scales.unit(2), Noise(), predicted, mean, 0.0)

    def log_p(x, value, variance):
        return -0.5 * ((x - value) ** 2 / variance + np.log(variance))

    of_wilson = log_p(1.0, 2.0, 4.25) + log_p(3.0, 2.0, 4.25)
    assert found[0] == pytest.approx(log_p(1.0, 1.0, 0.5) + log_p(3.0, 3.0, 0.5) - of_wilson)
    assert found[1] == pytest.approx(log_p(3.0, 1.0, 0.5) + log_p(1.0, 3.0, 0.5) - of_wilson)
    assert found[0] > 0 > found[1]
    # one that takes no part says nothing
    assert (
        crystal_outliers.belonging(data.only(np.array([True, False])), Scales.unit(2), Noise(), predicted, mean, 0.0)[1]
        == 0.0
    )
