"""A processed still as the record that travels to the keeper of its batch and into the journal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ssx_mpi.records import joined_tables, journal
from ssx_mpi.records.joined_experiments import COMMON, join
from ssx_mpi.stages.still_results import Still, identify


def describe(still: Still, name: str) -> dict[str, Any]:
    """The numbers of one still as plain data."""
    return {
        "image": still.image,
        "name": name,
        "n_spots": still.spots.n_spots,
        "hit": still.hit,
        "measured": asdict(still.spots.numbers),
        "lattices": [asdict(lattice) for lattice in still.indexed.lattices] if still.indexed else [],
        "crystals": [asdict(crystal) for crystal in still.integrated.numbers] if still.integrated else [],
        "failures": [[f.stage, f.reason] for f in still.failures],
        "seconds": dict(still.seconds),
    }


def encode(still: Still, name: str, steps: tuple[str, ...], common: dict[str, Any]) -> bytes:
    """The record of `still` with the tables of `steps`.

    Parameters
    ----------
    still
        What became of the still.
    name
        How the log names the image.
    steps
        Steps whose tables are wanted.
    common
        Detector and beam, as dicts, that need not be in every record.
    """
    content: dict[str, Any] = {"numbers": describe(still, name), "experiments": {}}
    packed: dict[str, tuple[joined_tables.TableLayout, list[bytes]]] = {}
    if still.spots.experiment is not None:
        content["experiments"]["imported"] = _plain([still.spots.experiment], common)
    if "find_spots" in steps and still.spots.table is not None:
        packed["strong"] = joined_tables.take_apart(still.spots.table.as_msgpack())
    for step, table, crystals in (
        ("index", "indexed", still.crystals),
        ("integrate", "integrated", still.integrated.crystals if still.integrated else None),
    ):
        if step in steps and crystals is not None:
            packed[table] = joined_tables.take_apart(crystals.reflections.as_msgpack())
            content["experiments"][table] = _plain(crystals.experiments, common)
    return journal.encode(still.image, content, packed)


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
    for _, own, data in packed:
        table = flex.reflection_table.from_msgpack(data)
        identify(table, [])
        table["id"] += first
        first += len(own["experiment"])
        reflections.extend(table)
    identify(reflections, [experiment.identifier for experiment in experiments])
    return experiments, reflections


def _plain(experiments, common: dict[str, Any]) -> dict[str, Any]:
    content = pack(experiments)
    for model, shared in common.items():
        content[model] = [COMMON if item == shared else item for item in content[model]]
    return content
