"""Merging statistics as tables for the log, and as JSON in the layout of dials.merge.json."""

from __future__ import annotations

import math

import numpy as np

from ssx_mpi.kernels.merging import ShellStatistics
from ssx_mpi.kernels.self_consistency import SelfConsistency

_HEADER = (
    "  d_max   d_min     #obs  #uniq   mult.  compl.     <I>  <I/sig>  CC1/2    +-    CC*  Rsplit  Rmeas   CCano   dI/s"
    "  CCref"
)


def shell_table(statistics: ShellStatistics) -> str:
    """One line per resolution shell and one for all."""
    lines = [_HEADER]
    for k in range(statistics.n_shells + 1):
        if k == statistics.n_shells:
            lines.append("-" * len(_HEADER))
        lines.append(
            f"{statistics.d_max[k]:7.2f} {statistics.d_min[k]:7.2f}"
            + f" {statistics.n_obs[k]:8d} {statistics.n_unique[k]:6d}"
            + _number(statistics.multiplicity[k], "8.2f")
            + _number(100 * statistics.completeness[k], "8.2f")
            + _number(statistics.mean_intensity[k], "8.1f")
            + _number(statistics.mean_i_over_sigma[k], "9.2f")
            + _number(statistics.cc_half[k], "7.3f")
            + _number(statistics.cc_half_sd[k], "6.3f")
            + _number(statistics.cc_star[k], "7.3f")
            + _number(statistics.r_split[k], "8.3f")
            + _number(statistics.r_factors.r_meas[k], "7.3f")
            + _number(statistics.cc_anom[k], "8.3f")
            + _number(statistics.anom_over_sigma[k], "7.2f")
            + _number(statistics.cc_reference[k], "7.3f")
        )
    return "\n".join(lines)


def consistency_text(found: SelfConsistency) -> str:
    """Whether the errors of the merged intensities fit the intensities, in one line."""
    return (
        f"self-consistency of the errors: CC1/2 in shells{_number(found.cc_half, '6.3f')}, expected from I/sigma"
        f"{_number(found.cc_half_expected, '6.3f')}; second moments acentric{_number(found.acentric, '5.2f')} (2 for "
        f"true errors, 1.5 for a perfect twin), centric{_number(found.centric, '5.2f')} (3, 2)"
    )


def consistency_in_numbers(found: SelfConsistency) -> dict[str, float | None]:
    """The same as plain data."""
    return {name: _finite(value) for name, value in vars(found).items()}


def merge_json(statistics: ShellStatistics, wavelength: float, wilson_b: float | None) -> dict:
    """Statistics under the keys that readers of dials.merge.json look for.

    Beside the keys of DIALS stand ``cc_one_half_sd``, ``cc_star``, ``r_split``, ``anom_over_sigma`` (the mean of
    |dI| / sigma(dI)) and ``cc_reference``. What is not computed here (significance of correlations, R and probability
    plots of anomalous differences) is null.
    """
    return {
        f"{wavelength:.5f}": {
            "merging_stats": _columns(statistics),
            "merging_stats_anom": _columns(statistics, anomalous=True),
            "scaling_tables": {
                "overall": _overall_table(statistics),
                "resolution_binned": _binned_table(statistics),
                "cc_half_significance_level": 0.01,
                "overall_summary_data": _summary(statistics, wilson_b),
            },
            "resolution_plots": _plots(statistics),
            "misc_plots": {},
            "unit_cell_plots": {},
        }
    }


def overall(statistics: ShellStatistics) -> dict:
    """Statistics of all shells together, under the keys of dials.merge.json, without what is null."""
    return {name: value for name, value in _row(statistics, statistics.n_shells, False).items() if value is not None}


def _number(value: float, form: str) -> str:
    width = form.split(".")[0]
    return " " * (int(width) - 1) + "-" if not math.isfinite(value) else f"{value:{form}}"


def _finite(value) -> float | None:
    return float(value) if math.isfinite(value) else None


def _row(statistics: ShellStatistics, k: int, anomalous: bool) -> dict:
    r_factors = statistics.r_factors_anom if anomalous else statistics.r_factors
    multiplicity = statistics.anom_multiplicity if anomalous else statistics.multiplicity
    return {
        "d_star_sq_min": statistics.d_min[k] ** -2.0,
        "d_star_sq_max": statistics.d_max[k] ** -2.0,
        "n_obs": int(statistics.n_obs[k]),
        "n_uniq": int(statistics.n_unique[k]),
        "multiplicity": _finite(multiplicity[k]),
        "completeness": _finite(100 * statistics.completeness[k]),
        "i_mean": _finite(statistics.mean_intensity[k]),
        "i_over_sigma_mean": _finite(statistics.mean_i_over_sigma[k]),
        "r_merge": _finite(r_factors.r_merge[k]),
        "r_meas": _finite(r_factors.r_meas[k]),
        "r_pim": _finite(r_factors.r_pim[k]),
        "r_anom": None,
        "cc_one_half": _finite(statistics.cc_half[k]),
        "cc_one_half_sd": _finite(statistics.cc_half_sd[k]),
        "cc_one_half_significance": None,
        "cc_one_half_critical_value": None,
        "cc_star": _finite(statistics.cc_star[k]),
        "r_split": _finite(statistics.r_split[k]),
        "cc_anom": _finite(statistics.cc_anom[k]),
        "anom_over_sigma": _finite(statistics.anom_over_sigma[k]),
        "cc_reference": _finite(statistics.cc_reference[k]),
        "anom_completeness": _finite(statistics.anom_completeness[k]),
        "anom_signal": None,
        "anom_probability_plot_all_data": None,
        "anom_probability_plot_expected_delta": None,
        "delta_i_mean_over_sig_delta_i_mean": None,
    }


def _columns(statistics: ShellStatistics, anomalous: bool = False) -> dict:
    rows = [_row(statistics, k, anomalous) for k in range(statistics.n_shells)]
    columns: dict = {name: [row[name] for row in rows] for name in rows[0]}
    columns["overall"] = _row(statistics, statistics.n_shells, anomalous)
    return columns


def _overall_table(statistics: ShellStatistics) -> list[list[str]]:
    columns = (statistics.n_shells, 0, statistics.n_shells - 1)

    def row(title: str, values: list[str]) -> list[str]:
        return [f"<strong>{title}</strong>", *values]

    def numbers(values: np.ndarray, form: str, factor: float = 1.0, unit: str = "") -> list[str]:
        return [f"{factor * values[k]:{form}}{unit}" for k in columns]

    return [
        ["", "Overall", "Low resolution", "High resolution"],
        row("Resolution (Å)", [f"{statistics.d_max[k]:.2f} - {statistics.d_min[k]:.2f}" for k in columns]),
        row("Observations", [str(int(statistics.n_obs[k])) for k in columns]),
        row("Unique reflections", [str(int(statistics.n_unique[k])) for k in columns]),
        row("Multiplicity", numbers(statistics.multiplicity, ".1f")),
        row("Completeness", numbers(statistics.completeness, ".2f", 100.0, "%")),
        row("Mean I/σ(I)", numbers(statistics.mean_i_over_sigma, ".1f")),
        row("R<sub>merge</sub>", numbers(statistics.r_factors.r_merge, ".3f")),
        row("R<sub>meas</sub>", numbers(statistics.r_factors.r_meas, ".3f")),
        row("R<sub>pim</sub>", numbers(statistics.r_factors.r_pim, ".3f")),
        row("R<sub>split</sub>", numbers(statistics.r_split, ".3f")),
        row("CC<sub>½</sub>", numbers(statistics.cc_half, ".3f")),
    ]


def _binned_table(statistics: ShellStatistics) -> list[list]:
    header = [
        "Resolution (Å)", "N(obs)", "N(unique)", "Multiplicity", "Completeness", "Mean I", "Mean I/σ(I)",
        "R<sub>merge</sub>", "R<sub>meas</sub>", "R<sub>pim</sub>", "R<sub>split</sub>", "CC<sub>½</sub>",
        "CC<sub>ano</sub>",
    ]  # fmt: skip
    rows: list[list] = [header]
    for k in range(statistics.n_shells):
        rows.append(
            [
                f"{statistics.d_max[k]:.2f} - {statistics.d_min[k]:.2f}",
                int(statistics.n_obs[k]),
                int(statistics.n_unique[k]),
                f"{statistics.multiplicity[k]:.2f}",
                f"{100 * statistics.completeness[k]:.2f}",
                f"{statistics.mean_intensity[k]:.1f}",
                f"{statistics.mean_i_over_sigma[k]:.1f}",
                *(
                    f"{values[k]:.3f}"
                    for values in (
                        statistics.r_factors.r_merge,
                        statistics.r_factors.r_meas,
                        statistics.r_factors.r_pim,
                        statistics.r_split,
                        statistics.cc_half,
                        statistics.cc_anom,
                    )
                ),
            ]
        )
    return rows


def _summary(statistics: ShellStatistics, wilson_b: float | None) -> dict:
    overall, last = statistics.n_shells, statistics.n_shells - 1

    def both(values: np.ndarray, form: str, factor: float = 1.0) -> str:
        return f"{factor * values[overall]:{form}} ({factor * values[last]:{form}})"

    limits = [f"{statistics.d_max[k]:.2f} - {statistics.d_min[k]:.2f}" for k in (overall, last)]
    return {
        "Resolution range (Å)": f"{limits[0]} ({limits[1]})",
        "Completeness (%)": both(statistics.completeness, ".2f", 100.0),
        "Multiplicity": both(statistics.multiplicity, ".2f"),
        "CC-half": both(statistics.cc_half, ".4f"),
        "I/sigma": both(statistics.mean_i_over_sigma, ".2f"),
        "Rmerge(I)": both(statistics.r_factors.r_merge, ".4f"),
        "Rsplit(I)": both(statistics.r_split, ".4f"),
        "Anomalous completeness (%)": both(statistics.anom_completeness, ".2f", 100.0),
        "Anomalous multiplicity": both(statistics.anom_multiplicity, ".2f"),
        "Wilson B": "-" if wilson_b is None else f"{wilson_b:.2f}",
    }


def _plots(statistics: ShellStatistics) -> dict:
    s_sq = [float(x) for x in 0.5 * (statistics.d_max[:-1] ** -2.0 + statistics.d_min[:-1] ** -2.0)]
    ticks = [float(x) for x in np.linspace(min(s_sq), max(s_sq), 5)]
    axis = {"title": "Resolution (Å)", "tickvals": ticks, "ticktext": [f"{x**-0.5:.2f}" for x in ticks]}

    def plot(title: str, label: str, **series: np.ndarray) -> dict:
        return {
            "data": [
                {"x": s_sq, "y": [_finite(y) for y in values[:-1]], "type": "scatter", "name": name}
                for name, values in series.items()
            ],
            "layout": {"title": title, "xaxis": axis, "yaxis": {"title": label, "rangemode": "tozero"}},
        }

    return {
        "cc_one_half": plot(
            "CC½ vs resolution", "CC½", **{"CC½": statistics.cc_half, "CC½ anomalous": statistics.cc_anom}
        ),
        "i_over_sig_i": plot("<I/σ(I)> vs resolution", "<I/σ(I)>", **{"I/sigI": statistics.mean_i_over_sigma}),
        "completeness": plot(
            "Completeness vs resolution",
            "Completeness",
            **{"Completeness": statistics.completeness, "Anomalous completeness": statistics.anom_completeness},
        ),
        "multiplicity_vs_resolution": plot(
            "Multiplicity vs resolution", "Multiplicity", Multiplicity=statistics.multiplicity
        ),
        "r_pim": plot("Rpim vs resolution", "Rpim", **{"R<sub>pim</sub>": statistics.r_factors.r_pim}),
        "r_split": plot("Rsplit vs resolution", "Rsplit", **{"R<sub>split</sub>": statistics.r_split}),
    }
