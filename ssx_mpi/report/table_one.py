"""Table 1 of a paper: merging statistics overall and in the lowest and highest shell, as text, LaTeX and mmCIF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# name in the statistics, words, format, LaTeX, item of mmCIF overall and in the highest shell
_ROWS: tuple[tuple[str, str, str, str, str, str], ...] = (
    (
        "n_obs",
        "Observations",
        "d",
        "Observations",
        "_reflns.pdbx_number_measured_all",
        "_reflns_shell.number_measured_all",
    ),
    (
        "n_uniq",
        "Unique reflections",
        "d",
        "Unique reflections",
        "_reflns.number_obs",
        "_reflns_shell.number_unique_obs",
    ),
    (
        "completeness",
        "Completeness (%)",
        ".1f",
        r"Completeness (\%)",
        "_reflns.percent_possible_obs",
        "_reflns_shell.percent_possible_all",
    ),
    ("multiplicity", "Multiplicity", ".1f", "Multiplicity", "_reflns.pdbx_redundancy", "_reflns_shell.pdbx_redundancy"),
    (
        "i_over_sigma_mean",
        "Mean I/sigma",
        ".1f",
        r"$\langle I/\sigma\rangle$",
        "_reflns.pdbx_netI_over_sigmaI",
        "_reflns_shell.meanI_over_sigI_obs",
    ),
    ("cc_one_half", "CC1/2", ".3f", r"$CC_{1/2}$", "_reflns.pdbx_CC_half", "_reflns_shell.pdbx_CC_half"),
    ("cc_star", "CC*", ".3f", "$CC^*$", "_reflns.pdbx_CC_star", "_reflns_shell.pdbx_CC_star"),
    ("r_split", "Rsplit", ".3f", r"$R_\mathrm{split}$", "_reflns.pdbx_R_split", "_reflns_shell.pdbx_R_split"),
    ("cc_anom", "CCano", ".3f", r"$CC_\mathrm{ano}$", "", ""),
    (
        "anom_over_sigma",
        "|dI|/sigma(dI)",
        ".2f",
        r"$\langle|\Delta I|/\sigma(\Delta I)\rangle$",
        "",
        "",
    ),
)


@dataclass(frozen=True)
class TableOne:
    """The numbers of Table 1.

    Attributes
    ----------
    facts
        Pairs of words and text: space group, cell, wavelength, crystals.
    columns
        For all, the lowest and the highest shell: resolution limits (d_max, d_min) and statistics by name.
    """

    facts: Sequence[tuple[str, str]]
    columns: tuple[tuple[tuple[float, float], dict[str, Any]], ...]

    @classmethod
    def of(cls, reduction: dict[str, Any], merging: dict[str, Any]) -> TableOne | None:
        """From ``ssx_mpi.reduce.json`` and the ``merging_stats`` of ``dials.merge.json``; None without reflections."""
        overall = reduction.get("merged", {}).get("merged")
        if not overall or not merging.get("n_obs"):
            return None
        cell = (
            " ".join(f"{v:.2f}" for v in reduction["cell"][:3])
            + ", "
            + " ".join(f"{v:.1f}" for v in reduction["cell"][3:])
        )
        facts = (
            ("Space group", reduction["space_group"]),
            ("Unit cell (Å, °)", cell),
            ("Wavelength (Å)", f"{reduction['wavelength']:.5f}"),
            ("Crystals", f"{overall['n_crystals']}"),
        )
        last = len(merging["n_obs"]) - 1
        shells = [{name: merging[name][k] for name, *_ in _ROWS if merging.get(name)} for k in (0, last)]
        limits = [_limits(merging["d_star_sq_max"][k], merging["d_star_sq_min"][k]) for k in (0, last)]
        whole = (limits[0][0], limits[1][1])
        return cls(facts, ((whole, overall), (limits[0], shells[0]), (limits[1], shells[1])))

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """Words and three values each."""
        ranges = [f"{high:.2f}–{low:.2f}" for (high, low), _ in self.columns]
        rows = [("Resolution (Å)", ranges)]
        rows += [(words, [_value(c.get(name), form) for _, c in self.columns]) for name, words, form, *_ in _ROWS]
        return rows

    @property
    def text(self) -> str:
        """As plain text."""
        lines = [f"{words:<20s} {value}" for words, value in self.facts]
        lines.append(f"{'':<20s} {'all':>14s} {'low':>14s} {'high':>14s}")
        lines += [f"{words:<20s} " + " ".join(f"{value:>14s}" for value in values) for words, values in self.rows]
        return "\n".join(lines)

    @property
    def latex(self) -> str:
        """As rows of a LaTeX tabular: overall, the highest shell in parentheses."""
        (high, low), (shell_high, shell_low) = self.columns[0][0], self.columns[2][0]
        lines = [rf"Resolution (\AA) & {high:.2f}--{low:.2f} ({shell_high:.2f}--{shell_low:.2f}) \\"]
        for name, _, form, words, *_ in _ROWS:
            values = [_value(self.columns[k][1].get(name), form) for k in (0, 2)]
            lines.append(rf"{words} & {values[0]} ({values[1]}) \\")
        return "\n".join([rf"{w} & {v} \\" for w, v in self.facts] + lines)

    @property
    def mmcif(self) -> str:
        """As items of mmCIF for deposition: all reflections, and the highest shell."""
        ((high, low), overall), _, ((shell_high, shell_low), shell) = self.columns
        lines = [f"{'_reflns.d_resolution_low':<42s}{high:.3f}", f"{'_reflns.d_resolution_high':<42s}{low:.3f}"]
        lines += [f"{item:<42s}{_value(overall.get(n), f, '?')}" for n, _, f, _, item, _ in _ROWS if item]
        lines += [
            f"{'_reflns_shell.d_res_low':<42s}{shell_high:.3f}",
            f"{'_reflns_shell.d_res_high':<42s}{shell_low:.3f}",
        ]
        lines += [f"{item:<42s}{_value(shell.get(n), f, '?')}" for n, _, f, _, _, item in _ROWS if item]
        return "\n".join(lines)


def _limits(low: float, high: float) -> tuple[float, float]:
    """Resolution limits (d_max, d_min) of a shell from 1/d^2."""
    return (math.inf if low <= 0 else low**-0.5), high**-0.5


def _value(value: Any, form: str, nothing: str = "-") -> str:
    if value is None or not math.isfinite(value):
        return nothing
    return format(int(value) if form == "d" else value, form)
