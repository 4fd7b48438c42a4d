"""What a run is doing, read from what it writes: for a screen, for plain text and for programs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.records.files import read_if_whole
from ssx_mpi.report.run_report import PROGRESS
from ssx_mpi.report.text import cell, counted, duration, share

if TYPE_CHECKING:
    from rich.console import RenderableType

# a run that says nothing for so long, in seconds, may have ended without a word
_SILENT = 180.0
# bytes at the end of the log that are looked at
_LOG_END = 20_000
# bars of the hits along the run, and reasons that are shown
_MOST_BARS, _MOST_REASONS, _MOST_WARNINGS = 60, 5, 6
_BARS = " ▁▂▃▄▅▆▇█"
# levels of folders below a given one in which runs are looked for
_DEPTH = 3


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes
    ----------
    folder
        Of the run.
    state
        As in ``ssx_mpi.json``, or ``starting``; ``silent`` where images were being processed and nothing was written
        for three minutes.
    doing
        Last line of the log.
    n_images, done, hits, indexed, crystals
        Images of the run, and how many are done, are hits and indexed; integrated crystals.
    cell, d_min
        Medians, angstrom and degrees; None where there is nothing yet.
    images_per_second, seconds_left
        While images are processed.
    merged
        How far the merged data are: ``cc_half``, ``completeness`` (per cent), ``multiplicity``, ``d_min``.
    failures
        Images and lattices left out, by reason.
    warnings
        In the log.
    hit_rate
        Share of hits along the run, in stretches of finished images.
    """

    folder: str
    state: str
    doing: str = ""
    n_images: int = 0
    done: int = 0
    hits: int = 0
    indexed: int = 0
    crystals: int = 0
    cell: list[float] | None = None
    d_min: float | None = None
    ranks: int = 0
    images_per_second: float | None = None
    seconds_left: float | None = None
    merged: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    hit_rate: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> RunStatus:
        """How the run in `folder` stands.

        Raises
        ------
        InputError
            When no run has written there.
        """
        run, progress = read_if_whole(folder / "ssx_mpi.json"), read_if_whole(folder / PROGRESS)
        lines = _log_end(folder / "ssx_mpi.log")
        if not (run or progress or lines):
            raise InputError(f"{folder}: no run has written here")
        total = run.get("total", {})
        counts = progress or {**total.get("counts", {}), "done": total.get("counts", {}).get("images", 0)}
        state = run.get("state", "starting")
        if progress:
            state = "running" if time.time() - progress["time"] < _SILENT else "silent"
        median = total.get("median", {})
        axes = [median.get(name) for name in ("a", "b", "c", "alpha", "beta", "gamma")]
        return cls(
            folder=str(folder),
            state=state,
            doing=lines[-1] if lines else "",
            n_images=counts.get("n_images", run.get("n_images", 0)),
            **{name: counts.get(name, 0) for name in ("done", "hits", "indexed", "crystals")},
            cell=None if None in axes else axes,
            d_min=median.get("d_min"),
            ranks=counts.get("ranks", run.get("ranks", 0)),
            images_per_second=progress.get("images_per_second"),
            seconds_left=progress.get("seconds_left"),
            merged=_merged(run),
            failures=total.get("failures", {}),
            warnings=_warnings(lines, run),
            hit_rate=_hit_rate(folder),
        )

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def _merged(run: dict[str, Any]) -> dict[str, Any]:
    reduced = run.get("reduction", {}).get("merged", {}).get("merged")
    if reduced:
        found = {name: reduced.get(name) for name in ("d_min", "completeness", "multiplicity", "n_crystals")}
        return {**found, "cc_half": reduced.get("cc_one_half")}
    live = run.get("live_merge", {})
    return {name: live[name] for name in ("d_min", "completeness", "multiplicity", "n_crystals", "cc_half") if live}


def _warnings(lines: Sequence[str], run: dict[str, Any]) -> list[str]:
    found = [line.removeprefix("WARNING ") for line in lines if line.startswith("WARNING ")]
    return list(dict.fromkeys([*run.get("reduction", {}).get("warnings", []), *found]))


def _log_end(path: Path) -> list[str]:
    """Level and message of the last lines of the log, without their times; INFO is not said."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOG_END))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        parts = line.split(" ", 3)
        # what does not begin with a date continues a message
        if len(parts) == 4 and parts[0][:2] == "20" and parts[2].isupper():
            line = parts[3] if parts[2] == "INFO" else f"{parts[2]} {parts[3]}"
        if line.strip():
            found.append(line.strip())
    return found


def _hit_rate(folder: Path) -> list[float]:
    """Share of hits in stretches of the finished images; only two columns of the table are read."""
    import h5py
    import numpy as np

    try:
        with h5py.File(folder / "images.h5", "r", locking=False) as file:
            finished, hit = (file["images"][name][:] for name in ("finished", "hit"))
    except (OSError, KeyError):
        return []
    hit = hit[finished > 0]
    parts = np.array_split(hit, max(1, min(_MOST_BARS, len(hit) // 20)))
    return [round(float(part.mean()), 4) for part in parts if len(part)]


def find_runs(folder: Path) -> list[Path]:
    """Folders of runs at and below `folder`, in the order of their names; their own folders are not looked into."""
    found: list[Path] = []

    def look(at: Path, depth: int) -> None:
        if (at / "ssx_mpi.log").exists() or (at / "ssx_mpi.json").exists():
            found.append(at)
        elif depth:
            for below in sorted(at.iterdir()):
                if below.is_dir() and not below.is_symlink() and below.name[0] != ".":
                    try:
                        look(below, depth - 1)
                    except PermissionError:
                        continue

    look(folder, _DEPTH)
    return found


def numbers_of(status: RunStatus) -> list[tuple[str, str]]:
    """What is known of a run, in words."""
    rows = [("images", f"{share(status.done, status.n_images)} of {status.n_images}")]
    rows.append(("hits", share(status.hits, status.done)))
    rows.append(("indexed, of hits", share(status.indexed, status.hits)))
    rows.append(("crystals", str(status.crystals)))
    if status.cell is not None:
        rows.append(("cell", cell(status.cell)))
    if status.d_min is not None:
        rows.append(("resolution of spots", f"{status.d_min:.2f} Å"))
    if status.images_per_second:
        left = "" if status.seconds_left is None else f", about {duration(status.seconds_left)} left"
        on = counted(status.ranks, "rank")
        rows.append(("speed", f"{status.images_per_second:.3g} images/s on {on}{left}"))
    if status.merged.get("d_min") is not None:
        rows.append(("merged", _merged_words(status.merged)))
    return rows


def _merged_words(merged: dict[str, Any]) -> str:
    cc_half = "unknown" if merged.get("cc_half") is None else f"{merged['cc_half']:.3f}"
    return (
        f"{counted(merged['n_crystals'], 'crystal')} to {merged['d_min']:.2f} Å: CC1/2 {cc_half}, completeness "
        f"{merged['completeness']:.1f}%, multiplicity {merged['multiplicity']:.1f}"
    )


def _failures(status: RunStatus) -> list[tuple[str, int]]:
    return sorted(status.failures.items(), key=lambda item: -item[1])[:_MOST_REASONS]


def bars(rates: Iterable[float]) -> str:
    """Shares as small bars, the highest of them full."""
    values = list(rates)
    top = max(values, default=0.0) or 1.0
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)


def plain(statuses: Sequence[RunStatus]) -> str:
    """For a pipe or a file: a block for one run, a table for several."""
    if len(statuses) != 1:
        return tabulate([_row(s) for s in statuses], headers=_HEADERS, disable_numparse=True)
    (status,) = statuses
    lines = [f"{status.folder}: {_state(status)}", tabulate(numbers_of(status), tablefmt="plain")]
    if status.hit_rate:
        lines.append(f"hits along the run, at most {100 * max(status.hit_rate):.0f}%: |{bars(status.hit_rate)}|")
    lines += [f"  {n} x {reason}" for reason, n in _failures(status)]
    lines += [f"WARNING: {warning}" for warning in status.warnings[-_MOST_WARNINGS:]]
    if status.state in ("starting", "running", "reducing", "silent"):
        lines.append(f"last line of the log: {status.doing}")
    return "\n".join(lines)


_HEADERS = ["run", "state", "done", "hits", "indexed", "crystals", "cell (Å)", "spots to (Å)", "CC1/2", "left"]


def _row(status: RunStatus) -> list[str]:
    percent = [
        f"{100 * part / whole:.0f}%" if whole else "-"
        for part, whole in (
            (status.done, status.n_images),
            (status.hits, status.done),
            (status.indexed, status.hits),
        )
    ]
    axes = "-" if status.cell is None else " ".join(f"{axis:.1f}" for axis in status.cell[:3])
    cc_half = status.merged.get("cc_half")
    return [
        Path(status.folder).name or status.folder,
        _state(status),
        *percent,
        str(status.crystals),
        axes,
        "-" if status.d_min is None else f"{status.d_min:.2f}",
        "-" if cc_half is None else f"{cc_half:.3f}",
        "-" if status.seconds_left is None else duration(status.seconds_left),
    ]


def _state(status: RunStatus) -> str:
    return status.state.replace("_", " ")


_COLOURS = {"done": "green", "running": "cyan", "reducing": "cyan", "starting": "cyan"}


def screen(statuses: Sequence[RunStatus]) -> RenderableType:
    """The same for a terminal, as rich draws it."""
    from rich.console import Group
    from rich.markup import escape
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if len(statuses) != 1:
        table = Table(*_HEADERS, expand=True)
        for status in statuses:
            name, state, *rest = _row(status)
            table.add_row(escape(name), Text(state, _COLOURS.get(status.state, "yellow")), *rest)
        return Panel(table, title=f"ssx_mpi, {counted(len(statuses), 'run')}", subtitle=_WAY_OUT)
    (status,) = statuses
    numbers = Table.grid(padding=(0, 3))
    for words, value in numbers_of(status):
        numbers.add_row(Text(words, "dim"), value)
    # alone it would not end its line
    bar = Table.grid(expand=True)
    bar.add_row(ProgressBar(total=max(status.n_images, 1), completed=status.done))
    parts: list[RenderableType] = [
        Text(_state(status), f"bold {_COLOURS.get(status.state, 'yellow')}"),
        bar,
        numbers,
    ]
    if status.hit_rate:
        parts += [
            Text(f"\nhits along the run, at most {100 * max(status.hit_rate):.0f}%", "dim"),
            Text(bars(status.hit_rate), "blue"),
        ]
    if status.failures:
        reasons = Table.grid(padding=(0, 2))
        for reason, n in _failures(status):
            reasons.add_row(Text(str(n), justify="right"), Text(reason))
        parts += [Text("\nleft out", "dim"), reasons]
    if status.warnings:
        parts += [Text("\nwarnings", "dim"), *(Text(w, "yellow") for w in status.warnings[-_MOST_WARNINGS:])]
    if status.doing:
        parts += [Text("\nlog", "dim"), Text(status.doing)]
    return Panel(Group(*parts), title=f"ssx_mpi: {escape(status.folder)}", subtitle=_WAY_OUT)


_WAY_OUT = "Ctrl-C ends this view, not the run"
