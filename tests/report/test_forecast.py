"""The forecast from a part of the data is what the rest of the data brings."""

from __future__ import annotations

import numpy as np
import pytest

from ssx_mpi.report.forecast import forecast

SHELLS = np.linspace(0.02, 0.4, 20)


def merged(n_crystals: int, seed: int, n_reflections: int = 1000):
    """CC1/2 of each shell and its error, from half-sets of simulated crystals whose signal falls with resolution."""
    rng = np.random.default_rng(seed)
    cc, sd = [], []
    for x in SHELLS:
        true = rng.exponential(np.exp(-10 * x), n_reflections)
        noise = 1.2 / np.sqrt(n_crystals / 2)
        half = [true + noise * rng.normal(size=n_reflections) for _ in range(2)]
        value = np.corrcoef(*half)[0, 1]
        cc.append(float(value))
        sd.append(float((1 - value**2) / np.sqrt(n_reflections - 2)))
    return cc, sd


def reached(n_crystals: int, d_min: float) -> float:
    """CC1/2 that many crystals have at a resolution, by the model that they are simulated with."""
    variance = np.exp(-10 * d_min**-2) ** 2
    return variance / (variance + 1.2**2 / (n_crystals / 2))


@pytest.mark.parametrize("seed", range(8))
def test_half_of_the_data_foresees_the_whole(seed):
    half = 400
    # where the whole has CC1/2 of 0.3
    grid = np.linspace(0.05, 0.4, 2000)
    x = grid[np.argmin([abs(reached(2 * half, v**-0.5) - 0.3) for v in grid])]
    found = forecast(SHELLS.tolist(), *merged(half, seed), half, float(x**-0.5))
    assert found is not None
    assert found.n_wanted == pytest.approx(2 * half, rel=0.15)
    assert found.low < found.n_wanted < found.high
    assert found.n_more == pytest.approx(half, abs=0.15 * 2 * half)


def test_the_error_is_that_of_repetitions():
    x = 0.24
    results = [forecast(SHELLS.tolist(), *merged(400, seed, 500), 400, x**-0.5) for seed in range(60)]
    logs = np.log([r.n_wanted for r in results])
    said = np.mean([np.log(r.high / r.n_wanted) for r in results])
    assert said == pytest.approx(np.std(logs), rel=0.3)


def test_enough_crystals_are_said_to_be_enough():
    found = forecast(SHELLS.tolist(), *merged(4000, 1), 4000, 3.0)
    assert found is not None and found.n_more == 0


@pytest.mark.parametrize("cc", [[None] * 20, [0.01] * 20, [0.9, 0.5] + [0.0] * 18])
def test_data_that_tell_nothing_give_no_forecast(cc):
    assert forecast(SHELLS.tolist(), cc, [0.02] * 20, 100, 2.0) is None
    assert forecast([], [], [], 100, 2.0) is None
