"""Experiment lists in their JSON form: joined as plain dicts, models that are equal kept once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

_MODELS = ("imageset", "beam", "detector", "goniometer", "scan", "crystal", "profile", "scaling_model")
#: stands in a record for the detector or beam that all images of the run share
COMMON = "common"
# one crystal or profile belongs to one lattice, even where two are equal to the last digit
_SHARED = ("beam", "detector", "goniometer", "scan")


def join(lists: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One experiment list from several, in their order, as ``ExperimentList.to_dict`` and ``as_json`` write them."""
    joined: dict[str, Any] = {"__id__": "ExperimentList", "experiment": [], **{m: [] for m in _MODELS}}
    known: dict[str, dict[str, int]] = {m: {} for m in _SHARED}
    for part in lists:
        places = {model: _places(joined, known, model, part.get(model, [])) for model in _MODELS}
        for experiment in part["experiment"]:
            moved = dict(experiment)
            moved.update({m: places[m][experiment[m]] for m in _MODELS if m in experiment})
            joined["experiment"].append(moved)
    return joined


def _places(joined: dict[str, Any], known: dict[str, dict[str, int]], model: str, items: list) -> list[int]:
    """Where in the joined list each of `items` is, adding those that are new."""
    places = []
    for item in items:
        if model not in _SHARED:
            places.append(len(joined[model]))
            joined[model].append(item)
            continue
        text = json.dumps(item, sort_keys=True)
        if text not in known[model]:
            known[model][text] = len(joined[model])
            joined[model].append(item)
        places.append(known[model][text])
    return places


def with_common(experiments: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """`experiments` of a record with the shared models in their places again."""
    restored = {m: [common[m] if item == COMMON else item for item in experiments[m]] for m in common}
    return {**experiments, **restored}
