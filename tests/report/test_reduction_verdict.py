"""What the last lines of a reduction warn of, and that they do not cry wolf."""

import pytest

from ssx_mpi.report import text
from ssx_mpi.report.reduction_verdict import has_signal, reduction_warnings


def numbers(**changed):
    merged = {"n_uniq": 5000, "completeness": 98.0, "cc_one_half": 0.97, "i_over_sigma_mean": 8.0, "d_min": 1.9}
    good = {
        "crystals": {"merged": 95, "unit cell outside the tolerance": 5},
        "ambiguity": {"start_agreement": [0.98, 1.0, 0.95]},
        "scaling": {
            "rounds": 14, "converged": True, "simplified": False, "model": "scales", "normalised_deviation": 1.0,
        },
        "merged": {"merged": {**merged, **changed.pop("of_merged", {})}},
    }  # fmt: skip
    return {**good, **changed}


def test_a_good_reduction_is_not_warned_of():
    assert reduction_warnings(numbers()) == []
    assert reduction_warnings(numbers(ambiguity=None, scaling=None)) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"crystals": {"merged": 17, "no scale found": 19}}, "only 17 of 36 crystals are merged: 19 no scale found"),
        ({"crystals": {"merged": 90, "lowering CC1/2": 10}}, "only 90 of 100"),
        ({"ambiguity": {"start_agreement": [0.54, 1.0, 0.77]}}, "more than 77% of the crystals"),
        ({"ambiguity": {"start_agreement": [1.0, 1.0], "above_chance": 1.03}}, "agree as well as the crystals do"),
        ({"without_background": 0.06}, "no background was found for 6% of the reflections"),
        ({"of_merged": {"n_uniq": 9}}, "hardly any reflections are merged (9)"),
        ({"of_merged": {"completeness": 0.02}}, "hardly any of the possible reflections"),
        ({"of_merged": {"cc_one_half": 0.09}}, "hardly any signal (CC1/2 0.09"),
        ({"of_merged": {"cc_one_half": None}}, "too few reflections in both half-sets"),
    ],
)
def test_what_a_user_must_know_is_said_once(changed, words):
    (warning,) = reduction_warnings(numbers(**changed))
    assert words in warning


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"converged": False, "rounds": 100}, "did not converge in 100 rounds"),
        ({"simplified": True}, "only with a simpler model: scales"),
        ({"normalised_deviation": 1.6}, "rms normalised deviation 1.60"),
    ],
)
def test_scaling_that_went_wrong_is_said(changed, words):
    good = numbers()
    (warning,) = reduction_warnings({**good, "scaling": {**good["scaling"], **changed}})
    assert words in warning


def test_nine_in_a_hundred_left_out_is_no_warning():
    assert reduction_warnings(numbers(crystals={"merged": 91, "no scale found": 9})) == []


def test_no_resolution_is_claimed_without_evidence():
    weak = numbers(of_merged={"cc_one_half": 0.1})
    weak["warnings"] = reduction_warnings(weak)
    block = text.reduction_block(weak)
    assert "resolution 1.90" not in block
    assert block.splitlines()[-1].startswith("WARNING: merged: hardly any signal")
    assert "resolution 1.90 Å" in text.reduction_block(numbers())


@pytest.mark.parametrize(("cc", "known"), [(0.3, True), (0.29, False), (None, None), (float("nan"), None)])
def test_signal_is_what_half_sets_agree_on(cc, known):
    assert has_signal({"cc_one_half": cc, "i_over_sigma_mean": 3.0}) is known
