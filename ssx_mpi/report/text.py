"""Blocks of text for the log and the terminal, made from recorded numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from ssx_mpi.report.statistics import CELL_NAMES, Statistics

_MOST_REASONS = 8


def share(part: int, whole: int) -> str:
    """A count with its percentage of `whole`."""
    return f"{part} ({100 * part / whole:.1f}%)" if whole else f"{part}"


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one."""
    return f"{number} {noun if number == 1 else noun + 's'}"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, _ = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def cell(parameters: Sequence[float] | None) -> str:
    """A unit cell on one line: lengths in angstrom, angles in degrees."""
    if parameters is None:
        return "-"
    return ", ".join([f"{p:.2f}" for p in parameters[:3]] + [f"{p:.1f}" for p in parameters[3:]])


def progress_block(
    title: str,
    batch: Statistics,
    total: Statistics,
    rate: float,
    left: float | None,
    merged: dict[str, Any] | None = None,
) -> str:
    """One batch and all batches so far, side by side; `merged` is how far the merged data have come."""
    rows = [[name, f(batch), f(total)] for name, f in _ROWS]
    if merged is not None:
        cc_half = "-" if merged["cc_half"] is None else f"{merged['cc_half']:.3f}"
        rows += [
            [f"completeness to {merged['d_min']:.2f} Å", "", f"{merged['completeness']:.1f}%"],
            ["multiplicity", "", f"{merged['multiplicity']:.2f}"],
            ["CC1/2", "", f"{cc_half} ({merged['n_crystals']} crystals)"],
        ]
    lines = [title, tabulate(rows, headers=["", "this batch", "so far"], tablefmt="simple"), _speed(rate, left)]
    return "\n".join(line for line in lines if line)


def _speed(rate: float, left: float | None) -> str:
    text = f"{rate:.2f} images/s" if rate < 10 else f"{rate:.0f} images/s"
    return text if left is None else f"{text}, about {duration(left)} left"


def _median(name: str, digits: int):
    def text(s: Statistics) -> str:
        value, spread = s.values[name].median, s.values[name].spread
        return "-" if value is None else f"{value:.{digits}f} ± {spread or 0:.{digits}f}"

    return text


_ROWS = [
    ("images", lambda s: str(s.counts["images"])),
    ("hits", lambda s: share(s.counts["hits"], s.counts["images"])),
    ("indexed images, of hits", lambda s: share(s.counts["indexed"], s.counts["hits"])),
    ("indexed images, of all", lambda s: share(s.counts["indexed"], s.counts["images"])),
    ("lattices", lambda s: str(s.counts["lattices"])),
    ("integrated crystals", lambda s: share(s.counts["crystals"], s.counts["lattices"])),
    ("a, b, c (Å)", lambda s: "  ".join(_median(n, 2)(s) for n in CELL_NAMES[:3])),
    ("alpha, beta, gamma (°)", lambda s: "  ".join(_median(n, 2)(s) for n in CELL_NAMES[3:])),
    ("rmsd (px)", _median("rmsd", 2)),
    ("d_min of spots (Å)", _median("d_min", 2)),
    ("mosaicity (°)", _median("mosaicity", 3)),
    ("mean I/sigma", _median("i_over_sigma", 2)),
]


def final_block(total: Statistics, done: int, seconds: float, n_ranks: int) -> str:
    """What a run gave, what it left out and where the time went; `done` images were finished in these `seconds`."""
    rows = [[name, f(total)] for name, f in _ROWS]
    parts = [tabulate(rows, tablefmt="plain")]
    if total.failures:
        reasons = [[n, reason] for reason, n in total.failures.most_common(_MOST_REASONS)]
        hidden = len(total.failures) - len(reasons)
        parts.append("Left out:\n" + tabulate(reasons, tablefmt="plain"))
        if hidden > 0:
            parts.append(f"  and {hidden} more reasons, in ssx_mpi.json")
    if total.seconds:
        stages = ", ".join(f"{stage} {s:.1f}" for stage, s in total.seconds.items())
        parts.append(f"CPU-seconds: {stages}; slowest image {total.slowest[1]} with {total.slowest[0]:.1f}")
    rate = done / seconds if seconds else 0.0
    parts.append(f"{done} images in {duration(seconds)} on {n_ranks} ranks, {_speed(rate, None)}")
    return "\n".join(parts)


def reduction_block(numbers: dict[str, Any]) -> str:
    """What became of the crystals in a reduction, and the statistics of each set of merged intensities."""
    # with a reduction alone
    from ssx_mpi.report.reduction_verdict import has_signal

    lines = [f"{n:7d} {'crystal' if n == 1 else 'crystals'} {fate}" for fate, n in numbers["crystals"].items()]
    for name, merged in numbers["merged"].items():
        known = has_signal(merged)
        shown = [
            f"{title} {merged[key]:{form}}{unit}"
            for key, title, form, unit in _MERGED
            if merged.get(key) is not None and (known or key != "d_min")
        ]
        lines.append(f"{name}: {', '.join(shown)}")
    lines += [f"WARNING: {warning}" for warning in numbers.get("warnings", ())]
    return "\n".join(lines)


_MERGED = [
    ("d_min", "resolution", ".2f", " Å"),
    ("n_uniq", "reflections", "d", ""),
    ("completeness", "completeness", ".1f", "%"),
    ("multiplicity", "multiplicity", ".2f", ""),
    ("i_over_sigma_mean", "I/sigma", ".1f", ""),
    ("cc_one_half", "CC1/2", ".3f", ""),
    ("r_split", "Rsplit", ".3f", ""),
    ("cc_reference", "CC to the reference", ".3f", ""),
]


def beam_centre_line(found, n_hits: int, moved: bool) -> str:
    """What the search for the beam centre came to."""
    percent = f"{100 * found.explained_before:.0f}% of the spots of {n_hits} hits explained"
    if not moved:
        return f"The beam centre is where it should be, as far as its search can tell ({percent})"
    fast, slow = found.shift
    return (
        f"The beam centre is off by {-fast:+.3f}, {-slow:+.3f} mm (fast, slow): {percent} with the header's, "
        f"{100 * found.explained:.0f}% with this one ({found.significance:.0f} sigma), which is used from here on"
    )


def refinement_block(refined) -> str:
    """The steps of a joint geometry refinement, and what happened to distance and cell."""
    steps = [[i, s.n_reflections, s.rmsd_x, s.rmsd_y, s.rmsd_psi] for i, s in enumerate(refined.steps)]
    headers = ["step", "reflections", "rmsd x (mm)", "rmsd y (mm)", "rmsd psi (°)"]
    parts = [
        f"Joint refinement of the detector with {refined.n_crystals} crystals "
        f"(engine {refined.engine}, outliers by {refined.outliers}):",
        tabulate(steps, headers=headers, floatfmt=".5g"),
        "",
        place_table(refined),
        *([levels_line(refined)] if refined.levels_tried else []),
        *([refined.note] if refined.note else []),
    ]
    return "\n".join(parts)


def place_table(refined) -> str:
    """What happened to distance, beam centre and cell, and how they trade off."""
    before, after, unsure = refined.before, refined.after, refined.uncertainty
    rows = [
        ["distance (mm)", f"{before.distance:.3f}", f"{after.distance:.3f}", _sigma(unsure, "distance")],
        ["beam centre, fast (mm)", f"{before.beam_x:.3f}", f"{after.beam_x:.3f}", _sigma(unsure, "shift_fast")],
        ["beam centre, slow (mm)", f"{before.beam_y:.3f}", f"{after.beam_y:.3f}", _sigma(unsure, "shift_slow")],
        ["median cell", cell(refined.cell_before), cell(refined.cell_after), ""],
    ]
    lines = [tabulate(rows, headers=["", "before", "refined", "uncertainty"], disable_numparse=True)]
    if unsure is not None:
        lines.append(
            f"Correlation of the distance to the cell lengths: {unsure.cell_correlation['distance']:.2f} "
            f"(the mean cell is known to {100 * unsure.relative_cell_sigma:.3f}%)"
        )
    return "\n".join(lines)


def drift_line(drift: dict[str, Any], n_images: int) -> str:
    """How the detector moved along a run, from the numbers of ``drift.json``."""
    moved = []
    for axis, name in enumerate(("fast axis", "slow axis", "normal")):
        extent, sigma = drift["extent"][axis], drift["extent_sigma"][axis]
        if extent > 3 * sigma:
            way = [shift[axis] for shift in drift["shift"]]
            first, last = sorted((way.index(min(way)), way.index(max(way))))
            images = [1 + round(drift["position"][k] * (n_images - 1)) for k in (first, last)]
            sign = "+" if way[last] > way[first] else "-"
            moved.append(f"{sign}{extent:.4f}({sigma:.4f}) mm along its {name} from image {images[0]} to {images[1]}")
    what = ", ".join(moved) or "by less than the uncertainty along each axis alone"
    kind = "evenly" if drift["pieces"] == 0 else "unevenly"
    return f"The detector, or the beam against it, moved along the run, {kind}: {what}. One geometry serves all images"


def levels_line(refined) -> str:
    """Which level of the detector's tree was refined, and why."""
    tried = "; ".join(
        f"level {t.level}: {t.distance:.4f} mm"
        + (f", closer by {100 * t.gain:.1f}({100 * t.error:.1f})%" if t.level else "")
        for t in refined.levels_tried
    )
    return (
        f"Hierarchy level {refined.hierarchy_level}, by the median distance between spots and predictions of "
        f"crystals that were left out ({tried})"
    )


def node_table(refined) -> str:
    """How the parts of the detector moved, each against the one that it is part of."""
    lines = [levels_line(refined)] if refined.levels_tried else []
    rows = [
        [
            node.level,
            name,
            node.n_spots,
            *map(_value, node.shift, node.shift_sigma),
            *map(_value, node.turn, node.turn_sigma),
        ]
        for node, name in zip(refined.nodes, _short([node.name for node in refined.nodes]))
    ]
    headers = ["level", "part", "spots", *(f"{name} (mm)" for name in ("fast", "slow", "normal"))]
    headers += [f"{name} (°)" for name in ("tilt fast", "tilt slow", "turn")]
    lines.append(tabulate(rows, headers=headers, disable_numparse=True))
    without = sum(node.n_spots == 0 for node in refined.nodes)
    if without:
        lines.append(f"Parts without a spot: {without}; they moved with the part above them alone")
    return "\n".join(lines)


def _short(names: list[str]) -> list[str]:
    """Of paths in a NeXus file as little of their ends as tells them apart."""
    parts = [name.split("/") for name in names]
    for kept in range(1, max((len(each) for each in parts), default=1)):
        ends = ["/".join(each[-kept:]) for each in parts]
        if len(set(ends)) == len(set(names)):
            return ends
    return names


def _value(value: float, sigma: float) -> str:
    return f"{value:+.4f}({sigma:.4f})"


def _sigma(uncertainty: Any, name: str) -> str:
    return "-" if uncertainty is None else f"{uncertainty.sigma[name]:.4f}"


def cell_warning(refined, given_cell: Sequence[float]) -> str | None:
    """A warning when the refined cell is not the one given; None when it is within 0.5%."""
    ratios = [after / given for after, given in zip(refined.cell_after[:3], given_cell[:3])]
    worst = max(ratios, key=lambda r: abs(r - 1))
    if abs(worst - 1) <= 0.005:
        return None
    moved = refined.after.distance / refined.before.distance - 1
    return (
        f"The refined cell is {100 * (worst - 1):+.2f}% from the cell given, and the distance {100 * moved:+.2f}% from "
        "the header's. Distance and cell lengths trade off: either the distance in the header is wrong and the refined "
        "cell is right, or the cell given is right for another temperature or crystal form. If you are sure of the "
        "cell, geometry_refinement.restrain_cell=True holds it."
    )


def refinement_json(refined) -> dict[str, Any]:
    """The same as plain data."""
    unsure = refined.uncertainty
    return {
        "n_crystals": refined.n_crystals,
        "engine": refined.engine,
        "steps": [vars(step) for step in refined.steps],
        "before": vars(refined.before),
        "after": vars(refined.after),
        "cell_before": refined.cell_before,
        "cell_after": refined.cell_after,
        "uncertainty": None
        if unsure is None
        else {name: getattr(unsure, name) for name in ("sigma", "cell_correlation", "relative_cell_sigma")},
        "correlation": None if unsure is None else unsure.correlation.tolist(),
        "converged": refined.converged,
        "hierarchy_level": refined.hierarchy_level,
        "levels_tried": [vars(level) for level in refined.levels_tried],
        "nodes": [vars(node) for node in refined.nodes],
    }
