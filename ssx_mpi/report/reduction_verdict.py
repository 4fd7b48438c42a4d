"""What the last lines of a reduction warn of."""

from __future__ import annotations

import math
from typing import Any

# share of the crystals left out from which on that is a warning
_LEFT_OUT = 0.1
# CC1/2 of all reflections together; intensities that fall off with resolution alone give more
_NO_SIGNAL = 0.3
# merged reflections, and share of the possible ones, below which something is wrong
_FEW_REFLECTIONS, _FEW_OF_POSSIBLE = 50, 0.01
# random starts of the ambiguity that set so few crystals alike have not found the one answer
_AGREEMENT = 0.9
# log-likelihood over that of observations in settings by chance: on simulated sets 0.9 to 1.0 where half of them
# were wrong, 2.2 to 3.8 where all were right
_ABOVE_CHANCE = 1.4
# rms normalised deviations outside of this: errors that do not mean what they say
_DEVIATIONS = (0.8, 1.25)
_KEPT = "merged"
# share of the reflections without a background
_WITHOUT_BACKGROUND = 0.05


def reduction_warnings(numbers: dict[str, Any]) -> list[str]:
    """One sentence for each thing that a user must know before believing the merged intensities.

    Parameters
    ----------
    numbers
        Of :meth:`ssx_mpi.reduction.outcome.Summary.numbers`.
    """
    return [
        *_crystals_left_out(numbers["crystals"]),
        *_background(numbers.get("without_background", 0.0)),
        *_ambiguity(numbers.get("ambiguity")),
        *_scaling(numbers.get("scaling")),
        *(warning for name, merged in numbers["merged"].items() for warning in _merged(name, merged)),
    ]


def _crystals_left_out(crystals: dict[str, int]) -> list[str]:
    total, kept = sum(crystals.values()), crystals.get(_KEPT, 0)
    if total - kept < max(1, _LEFT_OUT * total):
        return []
    reasons = ", ".join(f"{n} {reason}" for reason, n in crystals.items() if reason != _KEPT)
    return [f"only {kept} of {total} crystals are merged: {reasons}"]


def _background(share: float) -> list[str]:
    if share <= _WITHOUT_BACKGROUND:
        return []
    return [
        f"no background was found for {100 * share:.0f}% of the reflections, which are left out: look at the pixel "
        "values (gain, pedestal, trusted range)"
    ]


def _ambiguity(ambiguity: dict[str, Any] | None) -> list[str]:
    chance = ambiguity.get("above_chance") if ambiguity else None
    if chance is not None and chance < _ABOVE_CHANCE:
        return [
            "the indexing ambiguity is not settled: observations put into the settings by chance agree as well as the "
            f"crystals do (log-likelihoods {chance:.2f} to 1); give reference= or more crystals"
        ]
    # the best start agrees with itself
    others = sorted(ambiguity["start_agreement"])[:-1] if ambiguity else []
    if not others or max(others) >= _AGREEMENT:
        return []
    return [
        f"the indexing ambiguity is not settled: no other random start sets more than {100 * max(others):.0f}% of the "
        "crystals as the best one does; give reference= or more crystals"
    ]


def _scaling(scaling: dict[str, Any] | None) -> list[str]:
    if scaling is None:
        return []
    found = []
    if not scaling["converged"]:
        found.append(f"scaling did not converge in {scaling['rounds']} rounds")
    if scaling.get("simplified"):
        found.append(f"scaling converged only with a simpler model: {scaling['model']}")
    deviation = scaling["normalised_deviation"]
    if deviation is not None and not _DEVIATIONS[0] <= deviation <= _DEVIATIONS[1]:
        found.append(f"the standard deviations do not fit the scatter: rms normalised deviation {deviation:.2f}")
    return found


def _merged(name: str, merged: dict[str, Any]) -> list[str]:
    found = []
    n_unique, completeness = merged.get("n_uniq"), merged.get("completeness")
    if n_unique is not None and n_unique < _FEW_REFLECTIONS:
        found.append(f"{name}: hardly any reflections are merged ({n_unique})")
    elif completeness is not None and completeness < 100 * _FEW_OF_POSSIBLE:
        found.append(f"{name}: hardly any of the possible reflections are merged ({completeness:.1f}%)")
    if has_signal(merged) is False:
        found.append(
            f"{name}: hardly any signal (CC1/2 {merged['cc_one_half']:.2f} over all): no resolution is claimed"
        )
    elif has_signal(merged) is None:
        found.append(f"{name}: too few reflections in both half-sets for CC1/2: no resolution is claimed")
    return found


def has_signal(merged: dict[str, Any]) -> bool | None:
    """Whether CC1/2 says that there is signal; None where it says nothing."""
    cc_half = merged.get("cc_one_half")
    if cc_half is None or not math.isfinite(cc_half):
        return None
    return cc_half >= _NO_SIGNAL and (merged.get("i_over_sigma_mean") or 0.0) > 0
