"""A processed still as the record that travels to the keeper of its batch and into the journal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ssx_mpi.records import joined_tables, journal
from ssx_mpi.records.joined_experiments import COMMON, join
from ssx_mpi.stages.still_results import StillResult


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
    packed: dict[str, tuple[joined_tables.TableLayout, list[bytes]]] = {}
    if result.experiment is not None:
        content["experiments"]["imported"] = _plain([result.experiment], common)
    if "find_spots" in steps and result.strong is not None:
        packed["strong"] = joined_tables.take_apart(result.strong.as_msgpack())
    for step, table, crystals in (
        ("index", "indexed", result.indexed),
        ("integrate", "integrated", result.integrated),
    ):
        if step in steps and crystals is not None:
            packed[table] = joined_tables.take_apart(crystals.reflections.as_msgpack())
            content["experiments"][table] = _plain(crystals.experiments, common)
    return journal.encode(result.image, content, packed)


def pack(experiments) -> dict[str, Any]:
    """Experiments as plain data, in the form of an .expt file."""
    from dxtbx.model import ExperimentList

    return ExperimentList(list(experiments)).to_dict()


def unpack(packed: list[tuple[int, dict[str, Any], bytes]]):
    """One experiment list and reflection table from those of many stills.

    Parameters
    ----------
    packed
        Image number, experiments as :func:`pack` returns them, and reflections as MessagePack, of each still.
    """
    from dials.array_family import flex
    from dxtbx.model.experiment_list import ExperimentListFactory

    experiments = ExperimentListFactory.from_dict(join(p for _, p, _ in packed), check_format=False)
    reflections, first = flex.reflection_table(), 0
    identifiers = {i: e.identifier for i, e in enumerate(experiments)}
    for _, own, data in packed:
        table = flex.reflection_table.from_msgpack(data)
        for key in list(table.experiment_identifiers().keys()):
            del table.experiment_identifiers()[key]
        table["id"] += first
        first += len(own["experiment"])
        reflections.extend(table)
    for i, identifier in identifiers.items():
        reflections.experiment_identifiers()[i] = identifier
    return experiments, reflections


def _plain(experiments, common: dict[str, Any]) -> dict[str, Any]:
    content = pack(experiments)
    for model, shared in common.items():
        content[model] = [COMMON if item == shared else item for item in content[model]]
    return content
