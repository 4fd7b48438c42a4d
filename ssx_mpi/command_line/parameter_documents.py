"""Writes docs/parameters.md and docs/parameters.schema.json of a checkout; run it with ``make parameters``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ssx_mpi.command_line import compare, reduce, report, simulate, submit
from ssx_mpi.parameters import declaration, documents
from ssx_mpi.parameters.declaration import Definition
from ssx_mpi.parameters.run_parameters import Parameters


def programs() -> dict[str, Sequence[Definition]]:
    """Parameters of all programs, by their names."""
    return {
        "ssx_mpi": declaration.definitions(Parameters),
        "ssx_mpi.reduce": reduce.definitions(),
        "ssx_mpi.simulate": simulate.definitions(),
        "ssx_mpi.submit": submit.DEFINITIONS,
        "ssx_mpi.compare": declaration.definitions(compare.ComparisonParameters),
        "ssx_mpi.report": declaration.definitions(report.ReportParameters),
    }


def made() -> dict[str, str]:
    """Contents of the documents by their names."""
    return {
        "parameters.md": documents.page(programs()),
        "parameters.schema.json": json.dumps(documents.schema(programs()), indent=1) + "\n",
    }


def run() -> None:
    """Write the documents into the folder that is named, or the ``docs`` of the working folder."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for name, text in made().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    run()
