"""Headers that end or hang the process that reads them, found by a process that may end.

A damaged header can make HDF5 end the process by a segmentation fault, and a reader below Python search for ever;
neither is an exception. So the headers that make the models of a run are read by a child first. That is safe only where
MPI has not begun: when the program is started plainly, before it starts its ranks. They hear of what was found through
their environment. Under mpirun or srun there is no such moment. The child costs a second or two;
SSX_MPI_PROBE_HEADERS=no leaves it out.

Run as a program it reads the headers of the files that its argument names, and says before each which one it is.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ssx_mpi.images.frames import BadImage
from ssx_mpi.images.sources import HDF5_SUFFIXES, UNREADABLE, expand, find_images, format_class, unreadable
from ssx_mpi.parameters.run_parameters import Source
from ssx_mpi.parameters.user_input import InputError

#: seconds that a header may take
PATIENCE = 60.0
# a folder may hold any number of files: so many of each source are looked at
_MOST_LOOKED_AT = 20
_SWITCH = "SSX_MPI_PROBE_HEADERS"
_BEGUN, _DONE = "begun ", "done"


def probe_sources(sources: Iterable[Source]) -> None:
    """Read the first headers of each source in a child; this process and those it starts leave alone what ended it."""
    if os.environ.get(_SWITCH) == "no":
        return
    paths = [path for source in sources for path in _first_files(source)]
    found = probe(paths) if paths else {}
    if found:
        os.environ[UNREADABLE] = json.dumps(found)
        unreadable.cache_clear()


def _first_files(source: Source) -> list[str]:
    path = Path(source.name)
    try:
        if source.kind == "image":
            named = (Path(one.name) for one in expand(source))
            return [str(one) for one in itertools.islice(named, _MOST_LOOKED_AT) if one.is_file()]
        if source.kind == "directory":
            names = sorted(p for p in path.iterdir() if p.suffix.lower() in HDF5_SUFFIXES)
            if names and not any(p.suffix.lower() == ".cbf" for p in path.iterdir()):
                return [str(name) for name in names[:_MOST_LOOKED_AT]]
        images = find_images((source,))
    except (InputError, OSError):
        # said where the images are looked for
        return []
    return [images.locate(image)[0] for image in range(min(len(images), _MOST_LOOKED_AT))]


def probe(paths: list[str], patience: float = PATIENCE) -> dict[str, str]:
    """Files among `paths` that end or hang a process which reads their headers, and why.

    Parameters
    ----------
    patience
        Seconds that each may take.
    """
    found: dict[str, str] = {}
    left = list(paths)
    while left:
        culprit, reason, n_done = _read_until_one_fails(left, patience)
        if culprit is None:
            break
        found[culprit] = reason
        left = left[n_done + 1 :]
    return found


def _read_until_one_fails(paths: list[str], patience: float) -> tuple[str | None, str, int]:
    at, n_done, status = None, 0, 0
    command = [sys.executable, "-m", "ssx_mpi.images.header_probe", json.dumps(paths)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as child:
        for line in _lines(child, patience):
            if line is None:
                child.kill()
                return at, f"its header cannot be read within {patience:.0f} s", n_done
            if line.startswith(_BEGUN):
                at = json.loads(line.removeprefix(_BEGUN))
            elif line == _DONE:
                at, n_done = None, n_done + 1
        status = child.wait()
    # by its end after the last file, or by a fault of the child itself, nothing is said of a file
    return (at, "its header ends whatever reads it (it is damaged)", n_done) if status < 0 else (None, "", n_done)


def _lines(child: subprocess.Popen, patience: float) -> Iterator[str | None]:
    """Lines that `child` writes; None when it writes nothing for so many seconds."""
    assert child.stdout is not None
    pending = b""
    while True:
        ready, _, _ = select.select([child.stdout], [], [], patience)
        if not ready:
            yield None
            return
        content = os.read(child.stdout.fileno(), 1 << 16)
        if not content:
            return
        *lines, pending = (pending + content).split(b"\n")
        for line in lines:
            yield line.decode()


def main() -> None:
    """Read the headers of the files that the argument names, a JSON list."""
    from ssx_mpi import dials_compat

    paths = json.loads(sys.argv[1])
    out = sys.stdout
    sys.stdout = sys.stderr
    dials_compat.prepare()
    dials_compat.register_hdf5_filters()
    for path in paths:
        out.write(f"{_BEGUN}{json.dumps(path)}\n")
        out.flush()
        try:
            _models(path)
        except Exception:  # whatever formats raise: it is said where the header is read for good
            pass
        out.write(f"{_DONE}\n")
        out.flush()


def _models(path: str) -> None:
    kwargs = {"single_file_indices": [0]} if path.lower().endswith(HDF5_SUFFIXES) else {}
    if kwargs:
        find_images((Source("image", path),))
    try:
        imageset = format_class(path).get_imageset([path], as_imageset=True, **kwargs)
    except BadImage:
        return
    imageset.get_detector(0)
    imageset.get_beam(0)


if __name__ == "__main__":
    main()
