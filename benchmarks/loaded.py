"""What each rank of a run loads, and how long that takes: mpiexec -n 2 python benchmarks/loaded.py FOLDER ARGUMENTS...

Rank R writes FOLDER/rank_R.json at the end of the run: names of the modules that were executed, paths of the files that
Python opened, CPU-seconds until its first image, and the time of day then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

_opened: set[str] = set()
sys.addaudithook(lambda event, args: _opened.add(str(args[0])) if event == "open" else None)

from ssx_mpi.command_line import process  # noqa: E402
from ssx_mpi.parallel import dispatch  # noqa: E402


def main() -> None:
    folder = Path(sys.argv[1])
    first: dict[str, float] = {}
    whole_run, dispatched = process._main, dispatch.run

    def run(*args, **options):
        first.setdefault("cpu_seconds", time.process_time())
        first.setdefault("time", time.time())
        return dispatched(*args, **options)

    def report(comm, arguments):
        status = whole_run(comm, arguments)
        modules = sorted(name for name, m in sys.modules.items() if type(m).__name__ != "_DeferredModule")
        content = {"process": os.getpid(), "modules": modules, "files": sorted(_opened), **first}
        (folder / f"rank_{comm.rank}.json").write_text(json.dumps(content))
        return status

    dispatch.run, process._main = run, report
    process.run(sys.argv[2:])


if __name__ == "__main__":
    main()
