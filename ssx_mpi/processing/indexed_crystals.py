"""The indexed crystals of a run, from the files of its batches, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssx_mpi import dials_compat
from ssx_mpi.parallel.collective import on_every_rank
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import Parameters
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.records.batch_files import Batch, read_numbers
from ssx_mpi.records.files import DamagedFileError
from ssx_mpi.stages.fast.joint_refinement import COLUMNS, SharedCrystals, no_spots
from ssx_mpi.stages.still_results import identify, short_reason


def kept(parameters: Parameters) -> bool:
    """Whether a run keeps the indexed crystals of its batches, if it indexes."""
    return parameters.keep_intermediate or parameters.image_steps[-1] == "index"


def shared_indexed(comm: Communicator, batches: Sequence[Batch], geometry: tuple[Any, Any]):
    """The crystals of all ranks: those read by this one, and how they go with the others. Collective.

    Returns
    -------
    experiments, reflections, images
        As of :func:`read_indexed`, of this rank.
    shared : SharedCrystals
        With `geometry`, (detector, beam), to start from.

    Raises
    ------
    InputError
        On every rank, when a file is damaged.
    """
    with on_every_rank(comm, InputError):
        experiments, reflections, images = read_indexed(batches, comm.rank, comm.size)
    counts = comm.allgather(len(experiments))
    number = sum(counts[: comm.rank]) + np.arange(len(experiments))
    return experiments, reflections, images, SharedCrystals(comm, *geometry, number, sum(counts))


def read_indexed(batches: Sequence[Batch], rank: int, size: int):
    """Those of the share of a rank, in the order of the images.

    Returns
    -------
    experiments : dxtbx ExperimentList
    reflections : dials reflection_table
        What is refined against.
    images : (K,) int64
        The image of each crystal.

    Raises
    ------
    InputError
        When a file is damaged.
    """
    from dials.array_family import flex
    from dxtbx.model import ExperimentList

    experiments, reflections, images = ExperimentList(), no_spots(), []
    for batch in batches[rank * len(batches) // size : (rank + 1) * len(batches) // size]:
        path = batch.folder / "indexed.expt"
        if not path.exists():
            # a batch without a lattice
            continue
        try:
            own = ExperimentList.from_file(str(path), check_format=False)
            # read as what it is: of a file that is something else dials would load whatever is pickled there
            table = flex.reflection_table.from_msgpack_file(str(path.with_suffix(".refl")))
            numbers = read_numbers(batch)
        except DamagedFileError as error:
            raise InputError(str(error)) from error
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            newer = dials_compat.newer_table(path.with_suffix(".refl"))
            said = f"{path.with_suffix('')}.expt and .refl cannot be read: {short_reason(error)}"
            raise InputError(newer or said) from error
        images += [each["image"] for each in numbers for _ in each["lattices"]]
        table = table.select(table["id"] >= 0)
        identify(table, [])
        spots = flex.reflection_table()
        for name in COLUMNS:
            spots[name] = table[name]
        spots["id"] += len(experiments)
        reflections.extend(spots)
        experiments.extend(own)
    identify(reflections, [experiment.identifier for experiment in experiments])
    return experiments, reflections, np.array(images, dtype=np.int64)
