"""Figures of the report as data for plotly: a list of traces and a layout each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssx_mpi.report.forecast import Forecast
from ssx_mpi.report.run_summary import RunSummary

# told apart by the colour-blind (Okabe & Ito)
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#777777"),
)
# stretches of images that are averaged, and bars, at most
_MOST_STRETCHES, _MOST_BARS = 400, 40
# values of which a distribution is drawn
_FEWEST_SHOWN = 3
_HEIGHT = 300


@dataclass(frozen=True)
class Figure:
    """A figure: traces and layout as plotly has them, and what to look for in a sentence."""

    title: str
    look: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What plotly draws, with what all figures share."""
        layout: dict[str, Any] = {
            "height": _HEIGHT,
            "margin": {"l": 60, "r": 60, "t": 10, "b": 45},
            "font": {"family": "system-ui, sans-serif", "size": 12},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "legend": {"orientation": "h", "y": 1.12},
            **self.layout,
        }
        for name, axis in layout.items():
            if name.startswith(("xaxis", "yaxis")):
                axis.update({"gridcolor": "#e5e5e5", "zeroline": False, "linecolor": "#999", "showline": True})
        return {"data": self.traces, "layout": layout}


def _line(x, y, name: str, colour: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 60 else "lines",
        "x": _plain(x),
        "y": _plain(y),
        "name": name,
        "line": {"color": colour},
        **more,
    }


def _plain(values) -> list[Any]:
    """Numbers that JSON can hold: what is not finite is nothing."""
    found = []
    for value in np.asarray(values).tolist():
        found.append(None if isinstance(value, float) and not math.isfinite(value) else value)
    return [float(f"{v:.5g}") if isinstance(v, float) else v for v in found]


def _stretches(summary: RunSummary) -> tuple[np.ndarray, list[np.ndarray]]:
    """Middle of each stretch of images, and the rows of the table in it."""
    assert summary.images is not None
    image = summary.images["image"]
    n = max(1, min(_MOST_STRETCHES, len(image) // 5))
    parts = np.array_split(np.argsort(image, kind="stable"), n)
    return np.array([image[rows].mean() + 1 for rows in parts]), parts


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def along_images(summary: RunSummary) -> list[Figure]:
    """What happened along the images."""
    images = summary.images
    if images is None or not len(images["image"]):
        return []
    at, parts = _stretches(summary)
    hits = np.array([100 * images["hit"][rows].mean() for rows in parts])
    indexed = [images["n_lattices"][rows][images["hit"][rows] > 0] > 0 for rows in parts]
    share = np.array([100 * own.mean() if len(own) else math.nan for own in indexed])
    x_axis = {"title": {"text": "image"}}
    figures = [
        Figure(
            "Hits, and how many of them are indexed",
            "A sudden fall of hits: the jet, the chip or the beam. A fall of indexed hits alone: the detector or beam "
            "moved, or the crystals changed.",
            [_line(at, hits, "hits, % of images", BLUE), _line(at, share, "indexed, % of hits", ORANGE)],
            {"xaxis": dict(x_axis), "yaxis": {"title": {"text": "per cent"}, "range": [0, 103]}},
        )
    ]
    spots = np.array([_median(images["n_spots"][rows][images["hit"][rows] > 0].astype(float)) for rows in parts])
    d_min = np.array([_median(images["d_min"][rows]) for rows in parts])
    figures.append(
        Figure(
            "Strong spots and resolution of hits",
            "Fewer spots and worse resolution along the run: smaller crystals, a weaker beam, or radiation damage.",
            [
                _line(at, spots, "spots of a hit, median", GREEN),
                _line(at, d_min, "resolution of indexed spots (Å), median", PURPLE, yaxis="y2"),
            ],
            {
                "xaxis": dict(x_axis),
                "yaxis": {"title": {"text": "spots"}, "rangemode": "tozero"},
                "yaxis2": {"title": {"text": "Å"}, "overlaying": "y", "side": "right", "autorange": "reversed"},
            },
        )
    )
    cells = []
    for k, (name, colour) in enumerate(zip("abc", (BLUE, ORANGE, GREEN))):
        # crystals of high symmetry have equal axes
        if k and np.allclose(images[name], images["abc"[k - 1]], rtol=1e-4, equal_nan=True):
            continue
        middle = _median(images[name])
        values = np.array([_median(images[name][rows]) for rows in parts])
        cells.append(_line(at, 100 * (values / middle - 1), f"{name} ({middle:.2f} Å)", colour))
    rmsd = np.array([_median(images["rmsd"][rows]) for rows in parts])
    if np.any(np.isfinite(rmsd)):
        figures.append(
            Figure(
                "Unit cell and fit of the spots",
                "All axes drifting together: distance or wavelength. One axis: the crystals (drying, another form). A "
                "rising rmsd: the detector moved.",
                [*cells, _line(at, rmsd, "rmsd (pixels)", GREY, yaxis="y2")],
                {
                    "xaxis": dict(x_axis),
                    "yaxis": {"title": {"text": "deviation from the median (%)"}},
                    "yaxis2": {"title": {"text": "pixels"}, "overlaying": "y", "side": "right", "rangemode": "tozero"},
                },
            )
        )
    return [*figures, *_by_file(summary)]


def _by_file(summary: RunSummary) -> list[Figure]:
    images = summary.images
    assert images is not None
    number = images["file"]
    found = np.unique(number)
    if not 1 < len(found) <= _MOST_BARS:
        return []
    names = [images["files"][k].rsplit("/", 1)[-1] for k in found]
    hits = [100 * float(images["hit"][number == k].mean()) for k in found]
    indexed = [100 * float((images["n_lattices"][number == k] > 0).mean()) for k in found]
    return [
        Figure(
            "By file",
            "A file unlike the others was taken with another sample, position or shutter.",
            [
                {"type": "bar", "x": names, "y": _plain(hits), "name": "hits", "marker": {"color": BLUE}},
                {"type": "bar", "x": names, "y": _plain(indexed), "name": "indexed", "marker": {"color": ORANGE}},
            ],
            {"barmode": "group", "yaxis": {"title": {"text": "% of images"}}, "xaxis": {"title": {"text": "file"}}},
        )
    ]


def cells(summary: RunSummary) -> list[Figure]:
    """Distributions of the unit cells and of what describes a crystal."""
    images = summary.images
    if images is None:
        return []
    known = {
        name: images[name][np.isfinite(images[name])] for name in ("a", "b", "c", "mosaicity", "rmsd", "i_over_sigma")
    }
    if len(known["a"]) < _FEWEST_SHOWN:
        return []
    axes = [
        (f"{name} (Å)", known[name], colour)
        for k, (name, colour) in enumerate(zip("abc", (BLUE, ORANGE, GREEN)))
        # crystals of high symmetry have equal axes
        if not k or not np.allclose(known[name], known["abc"[k - 1]], rtol=1e-4)
    ]
    figures = [
        Figure(
            "Unit cells",
            "One peak: one crystal form. Two peaks: two forms, which a clustering threshold in the reduction keeps "
            "apart. A broad peak: a distance or a wavelength that is not known.",
            *_side_by_side(axes),
        )
    ]
    quality = [
        (words, known[name], colour)
        for name, words, colour in (
            ("mosaicity", "mosaicity (°)", PURPLE),
            ("rmsd", "rmsd (pixels)", GREY),
            ("i_over_sigma", "mean I/sigma", SKY),
        )
        if len(known[name]) >= _FEWEST_SHOWN
    ]
    if quality:
        look = "An rmsd well below one pixel is a geometry that fits; a long tail of mosaicity is damaged crystals."
        figures.append(Figure("Crystals", look, *_side_by_side(quality)))
    return figures


def _side_by_side(distributions: Sequence[tuple[str, np.ndarray, str]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout of histograms beside each other: words of each axis, values and colour."""
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "showlegend": False,
        "grid": {"rows": 1, "columns": len(distributions), "pattern": "independent"},
    }
    for k, (words, values, colour) in enumerate(distributions):
        suffix = "" if k == 0 else str(k + 1)
        traces.append({**_histogram(values, words, colour), "xaxis": f"x{suffix}", "yaxis": f"y{suffix}"})
        layout[f"xaxis{suffix}"] = {"title": {"text": words}}
        layout[f"yaxis{suffix}"] = {"title": {"text": "crystals"} if k == 0 else {}}
    return traces, layout


def _histogram(values: np.ndarray, name: str, colour: str) -> dict[str, Any]:
    """Bars over the middle 99% of the values, counted here so that the page does not grow with the images."""
    low, high = np.quantile(values, [0.005, 0.995])
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(2 * np.sqrt(len(values)), 5, 40))
    counts, edges = np.histogram(values, bins=bins, range=(float(low), float(high)))
    return {
        "type": "bar",
        "x": _plain(0.5 * (edges[1:] + edges[:-1])),
        "y": counts.tolist(),
        "width": float(edges[1] - edges[0]),
        "name": name,
        "marker": {"color": colour},
    }


def _resolution_axis(d_star_sq: np.ndarray) -> dict[str, Any]:
    ticks = np.linspace(0, d_star_sq.max(), 7)[1:]
    return {
        "title": {"text": "resolution (Å)"},
        "tickvals": _plain(ticks),
        "ticktext": [f"{v**-0.5:.2f}" for v in ticks],
        "range": [0, float(d_star_sq.max()) * 1.03],
    }


def merging(summary: RunSummary) -> list[Figure]:
    """Merging statistics against resolution."""
    m = summary.merging
    if not m or not m.get("n_obs"):
        return []
    x = 0.5 * (np.array(m["d_star_sq_min"], float) + np.array(m["d_star_sq_max"], float))
    error = {"type": "data", "array": _plain(np.array(m["cc_one_half_sd"], float)), "color": BLUE, "thickness": 1}
    limit = {
        "type": "line",
        "x0": 0,
        "x1": float(x.max()),
        "y0": 0.3,
        "y1": 0.3,
        "line": {"color": GREY, "dash": "dot"},
    }
    cc = [
        _line(x, np.array(m["cc_one_half"], float), "CC1/2", BLUE, error_y=error),
        _line(x, np.array(m["cc_star"], float), "CC*", SKY),
    ]
    figures = [
        Figure(
            "Correlation of half-sets",
            "CC1/2 falls smoothly to 0.3, where the data end. A dip at 3.9, 3.7 or 2.2 Å is ice; low values "
            "throughout are too few crystals, or an ambiguity that is not resolved.",
            cc,
            {
                "xaxis": _resolution_axis(x),
                "yaxis": {"title": {"text": "correlation"}, "range": [-0.1, 1.05]},
                "shapes": [limit],
            },
        ),
        Figure(
            "Completeness and multiplicity",
            "Low completeness at low resolution: a beamstop or overloads; at high resolution: the corners of the "
            "detector. A cap below 100% everywhere is a preferred orientation, or too few crystals.",
            [
                _line(x, np.array(m["completeness"], float), "completeness (%)", GREEN),
                _line(x, np.array(m["multiplicity"], float), "multiplicity", ORANGE, yaxis="y2"),
            ],
            {
                "xaxis": _resolution_axis(x),
                "yaxis": {"title": {"text": "per cent"}, "range": [0, 103]},
                "yaxis2": {
                    "title": {"text": "multiplicity"},
                    "overlaying": "y",
                    "side": "right",
                    "rangemode": "tozero",
                },
            },
        ),
        Figure(
            "Signal and disagreement",
            "I/sigma falls to about one and Rsplit rises to about one where the data end.",
            [
                _line(x, np.array(m["i_over_sigma_mean"], float), "mean I/sigma", PURPLE),
                _line(x, np.array(m["r_split"], float), "Rsplit", RED, yaxis="y2"),
            ],
            {
                "xaxis": _resolution_axis(x),
                "yaxis": {"title": {"text": "I/sigma"}, "rangemode": "tozero"},
                "yaxis2": {"title": {"text": "Rsplit"}, "overlaying": "y", "side": "right", "rangemode": "tozero"},
            },
        ),
    ]
    significance = m.get("anom_over_sigma", [])
    if any(v is not None for v in significance):
        figures.append(
            Figure(
                "Anomalous signal",
                "Differences of Friedel mates over their errors are 0.8 where there is noise alone, and correlate "
                "between half-sets where there is signal.",
                [
                    _line(x, np.array(significance, float), "mean |dI| / sigma(dI)", PURPLE),
                    _line(x, np.array(m["cc_anom"], float), "CCano", RED, yaxis="y2"),
                ],
                {
                    "xaxis": _resolution_axis(x),
                    "yaxis": {"title": {"text": "|dI| / sigma(dI)"}, "rangemode": "tozero"},
                    "yaxis2": {"title": {"text": "CCano"}, "overlaying": "y", "side": "right"},
                },
            )
        )
    mean = np.array(m["i_mean"], float)
    with np.errstate(invalid="ignore", divide="ignore"):
        logarithm = np.log(mean)
    figures.append(
        Figure(
            "Mean intensity (Wilson)",
            "Straight beyond 4 Å. A bump at an ice ring is ice; a rise at the end is noise that is merged as signal.",
            [_line(x, logarithm, "log of the mean intensity", BLUE)],
            {"xaxis": _resolution_axis(x), "yaxis": {"title": {"text": "ln I"}}},
        )
    )
    return figures


def scales(crystals: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Figure]:
    """Scale factors and B along the merged crystals.

    Parameters
    ----------
    crystals
        Logarithm of the scale and B (square angstrom) of the crystals of each file, in their order.
    """
    if not crystals:
        return []
    log_scale, b = (np.concatenate([part[k] for part in crystals]) for k in (0, 1))
    if len(b) < 3:
        return []
    parts = np.array_split(np.arange(len(b)), max(1, min(_MOST_STRETCHES, len(b) // 3)))
    at = np.array([rows.mean() + 1 for rows in parts])
    return [
        Figure(
            "Scale and B of the crystals",
            "A slow rise of B is radiation damage; a fall of the scale is a weaker beam or thinner crystals.",
            [
                _line(at, np.array([_median(log_scale[rows]) for rows in parts]), "log of the scale, median", BLUE),
                _line(at, np.array([_median(b[rows]) for rows in parts]), "B (Å²), median", ORANGE, yaxis="y2"),
            ],
            {
                "xaxis": {"title": {"text": "crystal, in the order of the images"}},
                "yaxis": {"title": {"text": "log scale"}},
                "yaxis2": {"title": {"text": "B (Å²)"}, "overlaying": "y", "side": "right"},
            },
        )
    ]


def growth(prediction: Forecast) -> Figure:
    """CC1/2 at the wanted resolution against the number of crystals."""
    most = max(2.0 * prediction.n_wanted, 1.5 * prediction.n_now)
    n = np.linspace(0, most, 80)[1:]
    odds = prediction.cc_half / (1 - prediction.cc_half)
    curves = []
    for wanted, name, dash in (
        (prediction.n_wanted, "expected", "solid"),
        (prediction.low, "one deviation better", "dot"),
        (prediction.high, "one deviation worse", "dot"),
    ):
        ratio = odds * n / wanted
        colour = BLUE if dash == "solid" else GREY
        curves.append(_line(n, ratio / (1 + ratio), name, colour, line={"color": colour, "dash": dash}, mode="lines"))
    now = {"type": "line", "x0": prediction.n_now, "x1": prediction.n_now, "y0": 0, "y1": 1, "line": {"color": ORANGE}}
    return Figure(
        f"CC1/2 at {prediction.d_min:.2f} Å against the number of crystals",
        "The vertical line is what is merged now. Where the curve flattens, more crystals bring little.",
        curves,
        {
            "xaxis": {"title": {"text": "crystals"}},
            "yaxis": {"title": {"text": "CC1/2"}, "range": [0, 1.02]},
            "shapes": [now],
        },
    )


def refinement(geometry: dict[str, Any]) -> list[Figure]:
    """Where parts of the detector were moved to."""
    nodes = geometry.get("nodes") or []
    if not nodes:
        return []
    names = [node["name"].rsplit("/detector/", 1)[-1] for node in nodes]
    traces = [
        {
            "type": "bar",
            "x": names,
            "y": _plain([1000 * node["shift"][k] for node in nodes]),
            "error_y": {"type": "data", "array": _plain([1000 * node["shift_sigma"][k] for node in nodes])},
            "name": words,
            "marker": {"color": colour},
        }
        for k, (words, colour) in enumerate((("fast", BLUE), ("slow", ORANGE), ("normal", GREEN)))
    ]
    return [
        Figure(
            "Shifts of the parts of the detector",
            "Shifts of a few micrometres are noise; tens are misplaced sensors, which the next run should begin with "
            "(reference_geometry=geometry_refinement/refined.expt).",
            traces,
            {
                "barmode": "group",
                "yaxis": {"title": {"text": "shift (µm)"}},
                "xaxis": {"title": {"text": "part"}, "tickangle": -60, "automargin": True},
            },
        )
    ]


def reasons(failures: dict[str, int]) -> list[Figure]:
    """Why images gave nothing."""
    if not failures:
        return []
    shown = sorted(failures.items(), key=lambda item: item[1])[-12:]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [n for _, n in shown],
        "y": [reason if len(reason) < 60 else reason[:57] + "..." for reason, _ in shown],
        "marker": {"color": RED},
    }
    layout = {
        "xaxis": {"title": {"text": "images or lattices"}},
        "yaxis": {"automargin": True, "title": {"text": ""}},
        "height": 90 + 28 * len(shown),
        "showlegend": False,
    }
    return [Figure("Reasons", "Each reason is explained below.", [trace], layout)]


def cost(run: dict[str, Any]) -> list[Figure]:
    """CPU-seconds by stage."""
    seconds = run.get("total", {}).get("cpu_seconds", {})
    if not seconds:
        return []
    names = list(seconds)
    n = max(run["total"]["counts"].get("images", 1), 1)
    trace = {
        "type": "bar",
        "x": names,
        "y": _plain([float(seconds[name]) for name in names]),
        "text": [f"{seconds[name] / n:.3f} s an image" for name in names],
        "marker": {"color": SKY},
    }
    layout = {
        "yaxis": {"title": {"text": "CPU-seconds, all ranks"}},
        "xaxis": {"title": {"text": "stage"}},
        "showlegend": False,
    }
    return [Figure("CPU time by stage", "What the run spent its time on.", [trace], layout)]
