"""The report of a run as one HTML file that needs no network: tables, words, and figures that plotly draws."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi import __version__
from ssx_mpi.records.files import replacing
from ssx_mpi.report import figures, references
from ssx_mpi.report.reasons import explained
from ssx_mpi.report.run_summary import RunSummary
from ssx_mpi.report.text import cell, duration

NAME = "ssx_mpi.html"
BIBLIOGRAPHY = "ssx_mpi.bib"


def write_report(folder: Path, d_min: float | None = None, copy_to: Path | None = None) -> Path:
    """Write ``ssx_mpi.html`` and ``ssx_mpi.bib`` about the run or reduction in `folder`, from what it recorded.

    Parameters
    ----------
    d_min
        Resolution that the forecast is for, angstrom; by default a tenth beyond where the data end.
    copy_to
        Folder that gets a copy of the page as ``report.html``, as electronic logbooks look for it.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    InputError
        When there is nothing to report on.
    """
    return write_summary(RunSummary.read(folder), d_min, copy_to)


def write_summary(summary: RunSummary, d_min: float | None = None, copy_to: Path | None = None) -> Path:
    """Write the page about what has been read already, as ``write_report`` does."""
    page = render(summary, d_min)
    path = summary.folder / NAME
    with replacing(path) as file:
        file.write(page.encode())
    with replacing(summary.folder / BIBLIOGRAPHY) as file:
        file.write(references.bibtex(_cited(summary)).encode())
    if copy_to is not None:
        copy_to.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy_to / "report.html")
    return path


def render(summary: RunSummary, d_min: float | None = None) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    template = resources.files("ssx_mpi.report").joinpath("page.html").read_text()
    prediction = summary.forecast(d_min)
    drawn = [
        ("Along the images", figures.along_images(summary)),
        ("Crystals", figures.cells(summary)),
        ("Detector", figures.refinement(summary.geometry)),
        ("Why images gave nothing", figures.reasons(summary.failures)),
        ("Merging", figures.merging(summary) + figures.scales(summary.scales)),
        ("Forecast", [figures.growth(prediction)] if prediction else []),
        ("Cost", figures.cost(summary.run)),
    ]
    verdict, evidence = summary.verdict
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        name=summary.folder.resolve().name,
        folder=str(summary.folder.resolve()),
        version=__version__,
        verdict=verdict,
        evidence=evidence,
        state=summary.run.get("state", summary.reduction.get("state", "")),
        numbers=_numbers(summary),
        warnings=summary.warnings,
        table=summary.table_one,
        geometry=_geometry(summary.geometry),
        reasons=[(reason, n, *explained(reason)) for reason, n in summary.failures.items()],
        left_out=summary.run.get("left_out", [])[:50],
        crystals=summary.reduction.get("crystals", {}),
        forecast=_forecast(summary, prediction),
        cost=_cost(summary.run),
        parameters=_parameters(summary),
        references=references.words(_cited(summary)),
        sections=[(title, list(enumerate(of))) for title, of in drawn],
        figures=json.dumps([[figure.as_json() for figure in of] for _, of in drawn]).replace("<", "\\u003c"),
        library=_library(),
    )


def _library() -> str:
    """The plotting library, compressed, in letters."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _cited(summary: RunSummary) -> list[str]:
    return references.cited(bool(summary.geometry), bool(summary.merged))


def _numbers(summary: RunSummary) -> list[tuple[str, str, str]]:
    """The numbers that matter: value, words, and more of it."""
    counts, merged = summary.counts, summary.merged
    found = []
    if counts["images"]:
        share = 100 * counts["hits"] / counts["images"]
        found.append((f"{share:.1f}%", "hit rate", f"{counts['hits']} of {counts['images']} images"))
    if counts["hits"]:
        share = 100 * counts["indexed"] / counts["hits"]
        found.append((f"{share:.1f}%", "of hits indexed", f"{counts['indexed']} images, {counts['crystals']} crystals"))
    if merged:
        how = "where CC1/2 falls to 0.3" if merged.get("d_min_estimated") else "as asked for"
        found.append((f"{merged['d_min']:.2f} Å", "resolution", how))
    return found


def _geometry(geometry: dict[str, Any]) -> dict[str, Any]:
    if not geometry:
        return {}
    before, after, unsure = geometry["before"], geometry["after"], geometry.get("uncertainty") or {}
    sigma = unsure.get("sigma", {})
    rows = [
        (words, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{sigma[of]:.4f}" if of in sigma else "-")
        for words, name, of in (
            ("distance (mm)", "distance", "distance"),
            ("beam centre, fast (mm)", "beam_x", "shift_fast"),
            ("beam centre, slow (mm)", "beam_y", "shift_slow"),
        )
    ]
    rows.append(("median cell", cell(geometry["cell_before"]), cell(geometry["cell_after"]), "-"))
    first, last = geometry["steps"][0], geometry["steps"][-1]
    return {
        "rows": rows,
        "n_crystals": geometry["n_crystals"],
        "rmsd": tuple(1000 * float(np.hypot(step["rmsd_x"], step["rmsd_y"])) for step in (first, last)),
        "nodes": geometry.get("nodes") or [],
        "level": geometry.get("hierarchy_level", 0),
        "tried": geometry.get("levels_tried") or [],
        "cell_sigma": 100 * unsure["relative_cell_sigma"] if "relative_cell_sigma" in unsure else None,
        "correlation": unsure.get("cell_correlation", {}).get("distance"),
    }


def _forecast(summary: RunSummary, prediction) -> str:
    """What it takes to get further, in a sentence or two; empty where nothing can be said."""
    if prediction is None:
        return ""
    d_min, more = prediction.d_min, prediction.n_more
    if more == 0:
        return f"At {d_min:.2f} Å CC1/2 is expected to be above {prediction.cc_half:g} already."
    low, high = (max(0, round(n - prediction.n_now)) for n in (prediction.low, prediction.high))
    words = (
        f"For CC1/2 of {prediction.cc_half:g} at {d_min:.2f} Å about {more:,} more crystals are needed "
        f"({low:,} to {high:,}), {prediction.n_wanted:,.0f} in all."
    )
    counts, seconds = summary.counts, summary.run.get("seconds")
    if counts["crystals"] and counts["images"]:
        images = more * counts["images"] / counts["crystals"]
        words += f" At the present rate these are {images:,.0f} images"
        if seconds:
            words += f", processed in {duration(images * seconds / counts['images'])} on as many ranks"
        words += "."
    return words


def _cost(run: dict[str, Any]) -> list[tuple[str, str]]:
    if not run:
        return []
    rows = []
    if run.get("seconds"):
        rows.append(("wall time of the images", duration(run["seconds"])))
    rows.append(("ranks", str(run.get("ranks", "?"))))
    slowest = run.get("total", {}).get("slowest_image", {})
    if slowest.get("image"):
        rows.append(("slowest image", f"{slowest['image']}, {slowest['cpu_seconds']:.1f} CPU-seconds"))
    dispatch = run.get("dispatch")
    if dispatch:
        share = dispatch.get("images_of_rank") or [0]
        rows.append(("images of a rank", f"{min(share)} to {max(share)}"))
        rows.append(("ranks waited", f"{100 * dispatch['waiting']:.1f}% of the time"))
    return rows


def _parameters(summary: RunSummary) -> list[tuple[str, str]]:
    given = summary.run.get("parameters") or summary.reduction.get("parameters") or {}
    return [(name, str(value)) for name, value in given.items() if str(value) not in ("None", "", "[]", "{}")]
