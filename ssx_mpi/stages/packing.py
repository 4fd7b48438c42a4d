"""A processed still as the record that travels to the keeper of its batch and into the journal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ssx_mpi.records import journal, tables
from ssx_mpi.records.experiments import COMMON
from ssx_mpi.stages.stills import StillResult


def describe(result: StillResult, name: str) -> dict[str, Any]:
    """The numbers of one still as plain data."""
    return {
        "image": result.image,
        "name": name,
        "n_spots": result.n_spots,
        "hit": result.hit,
        "lattices": [asdict(lattice) for lattice in result.lattices],
        "crystals": [asdict(crystal) for crystal in result.crystals],
        "failures": [[f.stage, f.reason] for f in result.failures],
        "seconds": result.seconds,
    }


def encode(result: StillResult, name: str, steps: tuple[str, ...], common: dict[str, Any]) -> bytes:
    """The record of `result` with the tables of `steps`.

    Parameters
    ----------
    result
        What became of the still.
    name
        How the log names the image.
    steps
        Steps whose tables are wanted.
    common
        Detector and beam, as dicts, that need not be in every record.
    """
    content: dict[str, Any] = {"numbers": describe(result, name), "experiments": {}}
    packed: dict[str, tuple[tables.TableLayout, list[bytes]]] = {}
    if result.experiment is not None:
        content["experiments"]["imported"] = _plain([result.experiment], common)
    if "find_spots" in steps and result.strong is not None:
        packed["strong"] = tables.take_apart(result.strong.as_msgpack())
    for step, table, crystals in (
        ("index", "indexed", result.indexed),
        ("integrate", "integrated", result.integrated),
    ):
        if step in steps and crystals is not None:
            packed[table] = tables.take_apart(crystals.reflections.as_msgpack())
            content["experiments"][table] = _plain(crystals.experiments, common)
    return journal.encode(result.image, content, packed)


def _plain(experiments, common: dict[str, Any]) -> dict[str, Any]:
    from dxtbx.model import ExperimentList

    content = ExperimentList(list(experiments)).to_dict()
    for model, shared in common.items():
        content[model] = [COMMON if item == shared else item for item in content[model]]
    return content
