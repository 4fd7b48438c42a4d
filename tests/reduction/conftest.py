"""Synthetic data sets that several tests reduce."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import synthetic
from synthetic import Truth


@dataclass(frozen=True)
class DataSet:
    """Files of a synthetic data set, and its truth."""

    paths: list[Path]
    truth: Truth


@pytest.fixture(scope="session")
def lysozyme(tmp_path_factory) -> DataSet:
    """80 lysozyme crystals in two files; the last is stretched beyond any tolerance."""
    lattice = synthetic.Lattice(synthetic.LYSOZYME.cell, synthetic.LYSOZYME.space_group, 2.6)
    observations, truth = synthetic.simulate(lattice, 80, per_crystal=400)
    paths = synthetic.write_files(
        tmp_path_factory.mktemp("lysozyme"), observations, lattice, per_file=50, stretched=(79,)
    )
    return DataSet(paths, truth)


@pytest.fixture(scope="session")
def ambiguous(tmp_path_factory) -> DataSet:
    """60 crystals in P213, each indexed in one of two ways."""
    observations, truth = synthetic.simulate(synthetic.AMBIGUOUS, 60, per_crystal=300, ambiguous=True)
    paths = synthetic.write_files(tmp_path_factory.mktemp("ambiguous"), observations, synthetic.AMBIGUOUS, per_file=25)
    return DataSet(paths, truth)
