"""The error model finds what the noise was made with."""

import numpy as np
import pytest

from ssx_mpi.kernels import error_model
from ssx_mpi.kernels.reflections import Observations
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales, accumulate


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (1.4, 0.08), (0.8, 0.3)])
def test_noise_is_recovered(a, b):
    rng = np.random.default_rng(11)
    n_unique, multiplicity = 3000, 12
    truth = rng.exponential(300.0, n_unique)
    unique = np.repeat(np.arange(n_unique), multiplicity).astype(np.int32)
    n = len(unique)
    variance = rng.uniform(20, 200, n)
    sigma = a * np.sqrt(variance + (b * truth[unique]) ** 2)
    observations = Observations(
        np.array([0, n]), np.zeros((n, 3), np.int32), truth[unique] + sigma * rng.normal(size=n), variance,
        np.zeros(n, np.float32),
    )  # fmt: skip
    data = Indexed(observations, np.full(n_unique, 0.01), unique, np.zeros(n, np.uint8), np.ones(1, bool))
    scales, noise = Scales.unit(1), Noise(1.0, 0.1)
    merged = Merged(np.full(n_unique, 300.0), np.zeros(n_unique))
    for _ in range(8):
        for _ in range(2):
            merged = Merged.from_sums(accumulate(data, scales, noise, merged, 0.0))
        noise = error_model.refine_noise(error_model.deviation_sums(data, scales, noise, merged), noise)
    assert noise.a == pytest.approx(a, rel=0.02)
    assert noise.b == pytest.approx(b, abs=0.01)
    merged = Merged.from_sums(accumulate(data, scales, noise, merged, 0.0))
    left = error_model.deviations(error_model.deviation_sums(data, scales, noise, merged))
    assert left.overall == pytest.approx(1.0, abs=0.02)
    populated = left.number > 500
    assert populated.sum() >= 5
    assert np.all(np.abs(left.rms[populated] - 1) < 0.1)


def test_too_few_observations_leave_the_model_alone():
    sums = np.zeros((len(error_model.BIN_EDGES), 5))
    sums[3] = [10, 40, 10, 1, 1]
    assert error_model.refine_noise(sums, Noise(1.1, 0.2)) == Noise(1.1, 0.2)
