"""What the assessment of crystals tells the user: a table, JSON, a plot and the command to run next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ssx_mpi.parameters.run_parameters import Parameters
from ssx_mpi.report.text import cell, share

_MOST_CLUSTERS = 10


def table(assessment) -> str:
    """Clusters of unit cells, the most populous first."""
    rows = [
        [
            k + 1,
            share(len(c.members), assessment.n_crystals),
            cell(c.best_cell),
            c.metric_symmetry,
            "  ".join(f"{s:.2f}" for s in c.spread),
        ]
        for k, c in enumerate(assessment.clusters[:_MOST_CLUSTERS])
    ]
    headers = ["cluster", "crystals", "median cell (Å, °)", "metric symmetry", "spread of the reduced cell"]
    lines = ["Unit cell clusters:", tabulate(rows, headers=headers, tablefmt="simple")]
    hidden = len(assessment.clusters) - _MOST_CLUSTERS
    if hidden > 0:
        lines.append(f"and {hidden} smaller clusters, in assess_crystals.json")
    return "\n".join(lines)


def next_command(assessment, parameters: Parameters) -> str:
    """The command line that processes the same images with the most populous cell, ready to paste."""
    best = assessment.clusters[0]
    words = command_with(
        parameters,
        {
            "unit_cell": ",".join(f"{p:.2f}" for p in best.best_cell),
            "space_group": (parameters.space_group or best.metric_symmetry).replace(" ", ""),
            "output.directory": parameters.directory,
            # this folder holds the assessment, which the next run replaces
            "restart": True,
        },
    )
    return shlex.join(words)


def command_with(parameters: Parameters, changes: dict[str, Any]) -> list[str]:
    """The words of a command line that processes the same images with what `changes` says, by names of parameters."""
    words = ["ssx_mpi"]
    for source in parameters.sources:
        span = f":{source.first}:{source.last}" if source.first is not None else ""
        words.append(f"{source.kind}={source.name}{span}")
    choices = {name: value for name, value in _choices(parameters).items() if value is not None and name not in changes}
    words += [f"{name}={value}" for name, value in choices.items()]
    words += parameters.reduction_given
    words += [f"{name}={value}" for name, value in changes.items()]
    return words


def _choices(p: Parameters) -> dict[str, Any]:
    """What the next run takes over from this one, by the names of the parameters; None for what was not given."""
    return {
        "unit_cell": ",".join(f"{x:g}" for x in p.unit_cell) if p.unit_cell else None,
        "space_group": p.space_group.replace(" ", "") if p.space_group else None,
        "reference_geometry": p.reference_geometry,
        "starting_geometry": p.starting_geometry,
        "mask": p.mask,
        "d_min": p.d_min,
        "d_max": p.d_max,
        "max_lattices": p.max_lattices,
        "min_spots": p.min_spots,
        "batch_size": p.batch_size,
        "engine": p.engine,
        "keep_intermediate": p.keep_intermediate,
        "live_merge": p.live_merge,
        "geometry_refinement.n_crystals": p.geometry.wanted,
        "geometry_refinement.images_to_use": f"{p.geometry.first}:{p.geometry.last}" if p.geometry.first else None,
        "geometry_refinement.hierarchy_level": p.hierarchy_level,
        "geometry_refinement.panel_shift": p.panel_priors.shift,
        "geometry_refinement.panel_tilt": p.panel_priors.tilt,
        "beam_search": p.beam_search,
        "restrain_cell": p.restrain_cell,
        "spotfinding.min_spot_size": p.spotfinding.min_spot_size,
        "spotfinding.max_spot_size": p.spotfinding.max_spot_size,
        "integration.algorithm": p.integration.algorithm,
        "rlp_mosaicity": p.integration.rlp_mosaicity,
        "dials_import.phil": p.import_phil,
        "spotfinding.phil": p.spotfinding.phil,
        "indexing.phil": p.indexing_phil,
        "geometry_refinement.phil": p.refinement_phil,
        "integration.phil": p.integration.phil,
    }


def as_json(assessment, command: str) -> dict[str, Any]:
    """The clusters as plain data."""
    return {
        "n_crystals": assessment.n_crystals,
        "clusters": [
            {
                "n_crystals": len(c.members),
                "share": len(c.members) / assessment.n_crystals,
                "median_reduced_cell": c.cell,
                "spread": c.spread,
                "metric_symmetry": c.metric_symmetry,
                "median_cell": c.best_cell,
            }
            for c in assessment.clusters
        ],
        "next_command": command,
    }


def plot(assessment, path: Path) -> None:
    """Histograms of the reduced cell parameters, the clusters in colours."""
    # with its own figure class, matplotlib needs neither a display nor global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    clusters = assessment.clusters[:_MOST_CLUSTERS]
    for k, (axis, name) in enumerate(zip(axes.flat, ("a (Å)", "b (Å)", "c (Å)", "α (°)", "β (°)", "γ (°)"))):
        values = [assessment.cells[list(c.members), k] for c in clusters]
        axis.hist(values, bins=50, stacked=True, label=[f"{i + 1}" for i in range(len(values))])
        axis.set_xlabel(name)
        axis.set_ylabel("crystals")
    axes.flat[0].legend(title="cluster", fontsize="small")
    figure.suptitle(f"Reduced unit cells of {assessment.n_crystals} crystals")
    figure.savefig(path, dpi=100)
