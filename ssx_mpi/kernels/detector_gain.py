r"""The gain of a detector, pixel values to a photon, from the scatter of the background.

Photons are counted: their variance is their mean. A pixel that shows g for each photon, with readout noise of variance
r about zero, has the mean :math:`\mu = g m` and the variance :math:`g^2 m + r = g \mu + r`, so that

.. math:: g = \frac{\mathrm{Var} - r}{\mu}.

Two images a and b of the same background are compared pixel by pixel, block by block of 16 x 16 pixels. With
:math:`\rho = \mu_a / \mu_b` of a block, the difference :math:`d = a - \rho b` has no mean, whatever the background does
within the block and however much the pixels differ in sensitivity, which one image alone would take for scatter. Its
variance is :math:`g \mu_a + r + \rho^2 (g \mu_b + r)`, and summed over the blocks

.. math:: g = \frac{\sum (d^2 - (1 + \rho^2)\, r)}{\sum (\mu_a + \rho^2 \mu_b)}.

Where there is one image, its even columns are compared with its odd ones.

**Bragg spots** have more photons than the Poisson distribution of the block allows. With the gain as it is known, a
pixel of more photons than 1 in 10,000 of the background, and its neighbours, are left out, in both images; then gain
and background are computed again, and so on until the gain stays. The first gain must not be one that lets the spots
pass: where most pixels have no photon it is the lower quartile of those that have, which is one photon; otherwise it
follows from the median absolute difference of neighbouring pixels, of which spots are few.

**A photon in several pixels** (phosphor and fibres, interpolation, images that were binned or rotated) makes
neighbours alike and lowers the variance of each. What is lost by the pixel is found between neighbours: the variance
of a large area is still :math:`g` times its mean. Where neighbours are correlated, the autocovariances over the 5 x 5
pixels around are added to the variance.

Assumed are pixels without pedestal, and a spread within two pixels. The noise of a calibration that comes with each
frame is part of r; r is what the pixels below zero say of it.

References
----------
Leslie, A. G. W. (1999). Acta Cryst. D55, 1696-1702 (gain from the background).
Janesick, J. R. (2007). Photon Transfer. SPIE Press (variance against mean; differences of two images).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import maximum_filter
from scipy.stats import poisson

_BLOCK = 16
# rows of blocks are looked at, evenly spread, until there are so many pixels
_MOST_PIXELS = 1 << 20
# photons that so small a share of the pixels of the background has are signal
_SIGNAL = 1e-4
# a block needs this share of its pixels
_LEAST_USED = 0.5
_MOST_ROUNDS = 20
# the first gain may be too small by so much
_MOST_GROWTH = 6
# correlation of neighbours from which on a photon is in several pixels
_SPREAD = 0.05
_REACH = 2
# fewer photons of the background tell nothing
_FEWEST_PHOTONS = 300
# the ratio of two images in a block counts when its background is so many standard errors above none
_SURE_OF_RATIO = 5.0
# how well the variance of the readout is known beforehand, as a share of it
_READOUT_KNOWN = 0.3
# blocks that are taken together where the variance of the readout is fitted
_TOGETHER = 64
# a gain is named when it differs from one by this factor, and by so many standard errors; all pairs of images but a
# quarter must be on its side of the smaller factor
_CLEAR, _SLIGHT, _SIGMAS, _AGREE = 1.5, 1.2, 5.0, 0.75


@dataclass(frozen=True)
class Gain:
    """Pixel values to a photon.

    Attributes
    ----------
    value, error : float
        With its standard error.
    n_pairs : int
        Pairs of images that told.
    is_one : bool
        Whether it is one, as far as can be told.
    """

    value: float
    error: float
    n_pairs: int
    is_one: bool


@dataclass(frozen=True)
class Image:
    """Panels of one image.

    Attributes
    ----------
    data : sequence of (slow, fast) int32 or float64
    masks : sequence of (slow, fast) bool
        Pixels that can be trusted.
    readout : sequence of float
        Variance of the readout noise of each panel, in squared pixel values.
    """

    data: Sequence[np.ndarray]
    masks: Sequence[np.ndarray]
    readout: Sequence[float]


def estimate_gain(images: Sequence[Image]) -> Gain | None:
    """Gain of a detector from images of the same panels; None where they have too few photons.

    Consecutive images are paired. The estimate is the median over pairs, and depends on the images alone.
    """
    pairs: list[tuple[Image, Image | None]] = list(zip(images[::2], images[1::2]))
    found = [gain for pair in (pairs or [(image, None) for image in images]) if (gain := _of_pair(*pair)) is not None]
    if not found:
        return None
    values = np.array([value for value, _ in found])
    value = float(np.median(values))
    # those of one run, of one detector: their scatter, or what photons allow where that is larger
    scatter = 1.4826 * float(np.median(np.abs(values - value))) * 1.2533
    error = max(scatter, float(np.median([error for _, error in found]))) / np.sqrt(len(values))
    beyond = values > _SLIGHT if value > 1 else values < 1 / _SLIGHT
    far = max(value, 1 / value) > _CLEAR and abs(value - 1) > _SIGMAS * error
    return Gain(value, error, len(found), not (far and np.mean(beyond) >= _AGREE))


def _of_pair(one: Image, other: Image | None) -> tuple[float, float] | None:
    """Gain and its standard error from two images, or one."""
    first: list[np.ndarray] = []
    second: list[np.ndarray] = []
    good: list[np.ndarray] = []
    readout = []
    for k, noise in enumerate(one.readout):
        if other is None:
            width = one.data[k].shape[1] // 2 * 2
            a, b = (one.data[k][:, start:width:2] for start in (0, 1))
            usable = one.masks[k][:, 0:width:2] & one.masks[k][:, 1:width:2]
        else:
            a, b, usable = one.data[k], other.data[k], one.masks[k] & other.masks[k]
            noise = 0.5 * (noise + other.readout[k])
        for into, panel in ((first, a), (second, b), (good, usable)):
            into.append(_blocks(panel, sum(p.size for p in one.data)))
        readout.append(np.full(len(first[-1]), noise))
    a, b, usable, noise = (np.concatenate(parts) for parts in (first, second, good, readout))
    kept = usable.mean(axis=(1, 2)) >= _LEAST_USED
    if not kept.any():
        return None
    return _iterate(a[kept].astype(float), b[kept].astype(float), usable[kept], noise[kept])


def _blocks(panel: np.ndarray, n_pixels: int) -> np.ndarray:
    """Some of the blocks of a panel, evenly spread: (n, 16, 16)."""
    rows, columns = (size // _BLOCK for size in panel.shape)
    every = max(1, round(n_pixels / _MOST_PIXELS))
    bands = np.arange(0, rows, every) if rows else np.empty(0, int)
    whole = panel[: rows * _BLOCK, : columns * _BLOCK].reshape(rows, _BLOCK, columns, _BLOCK)
    return whole[bands].transpose(0, 2, 1, 3).reshape(-1, _BLOCK, _BLOCK)


def _iterate(a: np.ndarray, b: np.ndarray, good: np.ndarray, readout: np.ndarray) -> tuple[float, float] | None:
    first = _first_gain(a, good, readout)
    if first is None:
        return None
    gain = first
    background = [_means(image, good) for image in (a, b)]
    for _ in range(_MOST_ROUNDS):
        used = good.copy()
        for image, mean in zip((a, b), background):
            used &= ~_signal(image, good, mean, gain, readout)
        enough = used.mean(axis=(1, 2)) >= _LEAST_USED
        used &= enough[:, None, None]
        background = [_means(image, used) for image in (a, b)]
        before, (of_pixels, spread, error) = gain, _gain_of(a, b, used, background[0], background[1], readout, gain)
        # beyond what the first can be wrong by, spots have taken over
        if not 0 < of_pixels < _MOST_GROWTH * first:
            return None
        gain = of_pixels * spread
        if abs(gain - before) < 1e-3 * gain:
            break
    photons = sum(float((mean * used.sum(axis=(1, 2))).sum()) for mean in background) / gain
    return (gain, error) if photons >= _FEWEST_PHOTONS else None


def _first_gain(data: np.ndarray, good: np.ndarray, readout: np.ndarray) -> float | None:
    """A gain that is not far above the true one, and lets no spots pass."""
    noise = np.sqrt(readout)[:, None, None]
    values = data[good]
    above = good & (data > 4 * noise)
    if above.sum() < _FEWEST_PHOTONS // 10:
        return None
    if above.sum() < 0.5 * good.sum():
        return float(np.quantile(data[above], 0.25))
    both = good[:, :, 1:] & good[:, :, :-1]
    spread = float(np.median(np.abs(data[:, :, 1:] - data[:, :, :-1])[both])) / 0.6745
    mean = float(np.median(values))
    if mean <= 0:
        return None
    # whole photons may have a median difference of none: the fourth part of a photon is below any
    return max(0.5 * spread**2 - float(np.median(readout)), 0.0) / mean or 0.25 * float(np.quantile(data[above], 0.01))


def _means(data: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Mean over the pixels used, of each block; 0 where there are none."""
    n = used.sum(axis=(1, 2))
    return np.where(used, data, 0.0).sum(axis=(1, 2)) / np.maximum(n, 1)


def _signal(data: np.ndarray, good: np.ndarray, mean: np.ndarray, gain: float, readout: np.ndarray) -> np.ndarray:
    """Pixels with more than the background has, and their neighbours."""
    # the median does not see the spots, but of few photons it is none
    middle = np.median(np.where(good, data, mean[:, None, None]), axis=(1, 2))
    level = np.where(middle > 3 * gain, middle, np.minimum(mean, _typical(mean)))
    photons = np.maximum(level, 0.0) / gain
    most = poisson.isf(_SIGNAL, photons)
    # with the noise of the readout; half a photon more, for those that are not whole
    limit = gain * photons + np.hypot(gain * (most - photons + 0.5), 4 * np.sqrt(readout))
    above = good & (data > limit[:, None, None])
    return maximum_filter(above, size=(1, 3, 3)) if above.any() else above


def _typical(mean: np.ndarray) -> float:
    """Three times the median block: what spots alone lift a block above."""
    return 3 * float(np.median(mean))


def _gain_of(
    a: np.ndarray,
    b: np.ndarray,
    used: np.ndarray,
    mean_a: np.ndarray,
    mean_b: np.ndarray,
    readout: np.ndarray,
    gain: float,
) -> tuple[float, float, float]:
    """Gain by single pixels, what spread makes of it, and its standard error; 0 where there is nothing."""
    n = used.sum(axis=(1, 2))
    among = n > 1
    noise = readout[among]
    n, mean_a, mean_b = n[among], mean_a[among], mean_b[among]
    if not n.sum() or not (mean_a @ n > 0 and mean_b @ n > 0):
        return 0.0, 1.0, 0.0
    overall = (mean_a @ n) / (mean_b @ n)
    # a block of few photons has the ratio of the images
    certain = _SURE_OF_RATIO * (np.sqrt((gain * np.maximum(mean_b, 0.0) + noise) / n) + gain / n)
    ratio = (np.maximum(mean_a, 0.0) + certain * overall) / (np.maximum(mean_b, 0.0) + certain)
    difference = np.where(used[among], a[among] - ratio[:, None, None] * b[among], 0.0)
    # one degree of freedom of the block goes to its mean
    middle = difference.sum(axis=(1, 2)) / n
    difference = np.where(used[among], difference - middle[:, None, None], 0.0)
    scatter = (difference**2).sum(axis=(1, 2)) * n / (n - 1)
    gain, error = _fit(scatter, n * (mean_a + ratio**2 * mean_b), n * (1 + ratio**2) * noise, n)
    return gain, _spread(difference, used[among]), error


def _fit(scatter: np.ndarray, counts: np.ndarray, readout: np.ndarray, n: np.ndarray) -> tuple[float, float]:
    """Gain and its standard error, from sums of squares that are gain x counts + readout.

    Without readout it is the ratio of the sums. The readout is known within a third: its factor is fitted too, where
    the backgrounds are different enough to tell the two apart.
    """
    if not (readout > 0).any():
        gain = float(scatter.sum() / counts.sum())
        return gain, float(np.sqrt(((scatter - gain * counts) ** 2).sum()) / counts.sum())
    # neighbouring blocks together: the slope of a line is too small where what it is drawn against scatters by itself
    starts = np.arange(0, len(n), _TOGETHER)
    scatter, counts, readout, n = (np.add.reduceat(values, starts) for values in (scatter, counts, readout, n))
    gain, factor = max(float((scatter - readout).sum() / counts.sum()), 0.0), 1.0
    for _ in range(10):
        # the sum of n squares of a normal variate scatters by sqrt(2 / n) of itself
        sigma = np.sqrt(2 / n) * np.maximum(gain * np.maximum(counts, 0.0) + factor * readout, 1e-300)
        rows = np.stack([counts / sigma, readout / sigma], axis=1)
        normal = rows.T @ rows
        normal[1, 1] += 1 / _READOUT_KNOWN**2
        right = rows.T @ (scatter / sigma) + np.array([0.0, 1 / _READOUT_KNOWN**2])
        gain, factor = (float(x) for x in np.maximum(np.linalg.solve(normal, right), 0.0))
    rest = (scatter - gain * counts - factor * readout) / sigma
    return gain, float(np.sqrt(np.linalg.inv(normal)[0, 0] * max(1.0, np.mean(rest**2))))


def _spread(difference: np.ndarray, used: np.ndarray) -> float:
    """Variance with what neighbours share over that of the pixel; 1 where they share nothing."""
    total = 1.0
    nearest = []
    variance = (difference**2).sum() / max(used.sum(), 1)
    if not variance > 0:
        return 1.0
    for dy in range(_REACH + 1):
        for dx in range(-_REACH, _REACH + 1):
            if (dy, dx) <= (0, 0):
                continue
            one = np.s_[:, dy:, max(dx, 0) : _BLOCK + min(dx, 0)]
            other = np.s_[:, : _BLOCK - dy, max(-dx, 0) : _BLOCK + min(-dx, 0)]
            pairs = (used[one] & used[other]).sum()
            correlation = float((difference[one] * difference[other]).sum() / max(pairs, 1) / variance)
            if dy + abs(dx) == 1:
                nearest.append(correlation)
            # each stands for the pixel opposite too
            total += 2 * correlation
    return total if min(nearest) > _SPREAD else 1.0
