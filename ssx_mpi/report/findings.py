"""What is wrong with a sample or beam, as far as the table of images shows it.

Looked for are a stretch without hits, a cell that drifts, two crystal forms, and crystals that diffract ever less.

Each finding must be beyond chance and large enough to matter, so that a good run is told of none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

# a finding by chance is expected in one of so many runs
_ODDS = 1e6
# standard deviations of a rank correlation that go with these odds, both signs
_TREND_SIGMAS = 5.0
# a blank stretch is named from this share of the images on; hits there are at most this share of those elsewhere
_BLANK_SHARE, _BLANK_RATE = 0.1, 0.1
# crystals below which no trend and no second form is looked for
_FEWEST_CRYSTALS = 40
# relative change of a cell length, from the first third to the last, that merging notices
_CELL_CHANGE = 0.0015
# change of B, square angstrom, between the same thirds
_B_CHANGE = 3.0
# two forms: share of the smaller, distance of the medians in units of the wider form, and relative
_FORM_SHARE, _FORM_SIGMAS, _FORM_CHANGE = 0.08, 4.0, 0.004
# crystals of the middle of the gap, as a share of what lies as closely around the smaller form
_FORM_VALLEY = 0.25


def findings(images: dict[str, Any] | None, b_factors: Sequence[np.ndarray] = ()) -> list[str]:
    """Faults in words, most important first; none for a good run.

    Parameters
    ----------
    images
        Columns of ``images.h5``; None without.
    b_factors
        B of the merged crystals of each reduced file, square angstrom, in their order along the run.
    """
    found = []
    if images is not None and len(images["image"]):
        order = np.argsort(images["image"], kind="stable")
        found.append(_blank_stretch(images["image"][order], images["hit"][order] > 0))
        cells = np.stack([images[name][order] for name in ("a", "b", "c")], axis=1).astype(float)
        cells = cells[np.isfinite(cells).all(axis=1)]
        forms = _two_forms(cells)
        # two forms, one after the other, drift as well: the forms are what to act on
        found.extend([forms] if forms else [_drifting_cell(cells)])
    if len(b_factors):
        found.append(_damage(np.concatenate(list(b_factors))))
    return [each for each in found if each]


def _blank_stretch(image: np.ndarray, hit: np.ndarray) -> str:
    """A stretch of images with next to no hits, among others that have them.

    The stretch has the largest sum of logarithms of likelihood ratios between a tenth of the hit rate and the rate
    itself. By chance a sum as large as s is found in fewer than n exp(-s) of the runs (Karlin & Altschul (1990).
    Proc. Natl Acad. Sci. USA 87, 2264).
    """
    n, rate = len(hit), float(hit.mean())
    first = stop = 0
    score = 0.0
    # the rate elsewhere is known once the stretch is
    for _ in range(3):
        if not 0 < rate < 1:
            rate = min(max(rate, 1 / n), 1 - 1 / n)
        low = _BLANK_RATE * rate
        steps = np.where(hit, math.log(low / rate), math.log((1 - low) / (1 - rate)))
        total = np.concatenate([[0.0], np.cumsum(steps)])
        rise = total - np.minimum.accumulate(total)
        stop = int(np.argmax(rise))
        first, score = int(np.argmin(total[: stop + 1])), float(rise[stop])
        outside = n - (stop - first)
        if outside == 0:
            return ""
        rate = float(hit.sum() - hit[first:stop].sum()) / outside
    long_enough = stop - first >= _BLANK_SHARE * n
    if not long_enough or score < math.log(n * _ODDS):
        return ""
    inside = 100 * float(hit[first:stop].mean())
    return (
        f"images {image[first] + 1} to {image[stop - 1] + 1} have next to no hits ({inside:.1f}%, elsewhere "
        f"{100 * rate:.1f}%): an empty part of the chip, a jet that stopped, or a closed shutter"
    )


def _trend(values: np.ndarray) -> tuple[float, float]:
    """Rank correlation with the order in standard deviations, and the medians' change from first to last third."""
    n = len(values)
    ranks = rankdata(values)
    spread = float(ranks.std())
    if spread == 0:
        return 0.0, 0.0
    order = np.arange(n) - 0.5 * (n - 1)
    correlation = float(np.mean(order * (ranks - ranks.mean()))) / (spread * float(order.std()))
    third = n // 3
    return correlation * math.sqrt(n - 1), float(np.median(values[-third:]) - np.median(values[:third]))


def _drifting_cell(cells: np.ndarray) -> str:
    if len(cells) < _FEWEST_CRYSTALS:
        return ""
    changes = []
    for k in range(3):
        sigmas, change = _trend(cells[:, k])
        changes.append(change / float(np.median(cells[:, k])) if abs(sigmas) > _TREND_SIGMAS else 0.0)
    largest = max(changes, key=abs)
    if abs(largest) < _CELL_CHANGE:
        return ""
    words = ", ".join(f"{name} {100 * change:+.2f}%" for name, change in zip("abc", changes) if change)
    alike = all(change * largest > 0 and abs(change) > 0.5 * abs(largest) for change in changes)
    cause = (
        "all axes alike: the distance or the wavelength moved, or the crystals dry evenly"
        if alike
        else "not all axes alike: the crystals change, as they do when they dry"
    )
    return f"the unit cell drifts along the run ({words}; {cause})"


def _two_forms(cells: np.ndarray) -> str:
    """Two clusters of one cell length with a gap between them."""
    if len(cells) < _FEWEST_CRYSTALS:
        return ""
    for k in range(3):
        values = np.sort(cells[:, k])
        n = len(values)
        # the split with the least variance within its two parts (Otsu's)
        at = np.arange(1, n)
        sums = np.cumsum(values - values.mean())[:-1]
        between = sums**2 / (at * (n - at))
        split = int(np.argmax(between)) + 1
        low, high = values[:split], values[split:]
        share = min(len(low), len(high)) / n
        centres = [float(np.median(part)) for part in (low, high)]
        # widths by median deviations: strangers do not hide a gap
        width = max(1.4826 * float(np.median(np.abs(part - c))) for part, c in zip((low, high), centres))
        apart = centres[1] - centres[0]
        if share < _FORM_SHARE or apart < _FORM_SIGMAS * width or apart < _FORM_CHANGE * float(np.median(values)):
            continue
        middle, reach = sum(centres) / 2, apart / 8
        in_gap = int(np.sum(np.abs(values - middle) < reach))
        around = min(int(np.sum(np.abs(values - c) < reach)) for c in centres)
        if in_gap > _FORM_VALLEY * around:
            continue
        return (
            f"the crystals have two forms: {'abc'[k]} is {centres[0]:.2f} Å in {len(low)} and {centres[1]:.2f} Å in "
            f"{len(high)} crystals; merge them apart"
        )
    return ""


def _damage(b_factor: np.ndarray) -> str:
    if len(b_factor) < _FEWEST_CRYSTALS:
        return ""
    sigmas, change = _trend(b_factor)
    if sigmas < _TREND_SIGMAS or change < _B_CHANGE:
        return ""
    return (
        f"B rises by {change:.1f} Å² along the run: radiation damage where crystals are exposed more than once, or "
        "ever smaller crystals"
    )
