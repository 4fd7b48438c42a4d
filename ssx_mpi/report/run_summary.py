"""What a run folder holds, gathered for the report; from recorded numbers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.records import image_table
from ssx_mpi.records.files import read_if_whole
from ssx_mpi.report.findings import findings
from ssx_mpi.report.forecast import WANTED_CC_HALF, Forecast, forecast
from ssx_mpi.report.table_one import TableOne

# state of a run: verdict
GOOD, WARNED, UNUSABLE, NOTHING, RUNNING = "good", "usable with warnings", "unusable", "nothing", "not finished"
# CC1/2 of all reflections, and completeness in per cent, below which merged data are of no use
_NO_SIGNAL, _TOO_INCOMPLETE = 0.3, 20.0
# share of the hits that are indexed, and of images that fail to be read, that deserve a word
_FEW_INDEXED, _MANY_UNREAD = 0.3, 0.02


@dataclass(frozen=True)
class RunSummary:
    """Everything that the report tells of.

    Attributes
    ----------
    folder
        Of the run.
    run
        ``ssx_mpi.json``; empty where there are no images, as in the folder of a reduction.
    reduction, merging
        ``ssx_mpi.reduce.json`` and the statistics by resolution in ``dials.merge.json``; empty where nothing was
        merged.
    geometry, assessment
        ``geometry_refinement.json`` and ``assess_crystals.json``; empty where there are none.
    images
        Columns of ``images.h5``; None without.
    scales
        Logarithm of the scale, and B in square angstrom, of the merged crystals of each file that was reduced.
    gain
        ``import/gain.json``; empty without.
    """

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    reduction: dict[str, Any] = field(default_factory=dict)
    merging: dict[str, Any] = field(default_factory=dict)
    geometry: dict[str, Any] = field(default_factory=dict)
    assessment: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] | None = None
    scales: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    gain: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RunSummary:
        """What `folder` holds.

        Raises
        ------
        InputError
            When it is the folder of no run and of no reduction.
        """
        reduction = read_if_whole(folder / "LogFiles" / "ssx_mpi.reduce.json")
        merge = read_if_whole(folder / "LogFiles" / "dials.merge.json")
        merging = next(iter(merge.values()))["merging_stats"] if merge else {}
        summary = cls(
            folder,
            read_if_whole(folder / "ssx_mpi.json"),
            reduction,
            merging,
            read_if_whole(folder / "geometry_refinement" / "geometry_refinement.json"),
            read_if_whole(folder / "assess_crystals" / "assess_crystals.json"),
            image_table.read_columns(folder),
            _scales(folder),
            read_if_whole(folder / "import" / "gain.json"),
        )
        if not (summary.run or summary.reduction or summary.geometry or summary.assessment):
            raise InputError(f"{folder}: neither a run nor a reduction has written here")
        return summary

    @property
    def counts(self) -> Counter:
        """Images, hits, indexed images and so on."""
        return Counter(self.run.get("total", {}).get("counts", {}))

    @property
    def failures(self) -> dict[str, int]:
        """Images and lattices that were left out, by reason."""
        return self.run.get("total", {}).get("failures", {})

    @property
    def merged(self) -> dict[str, Any]:
        """Overall statistics of ``merged.mtz``; empty without."""
        return self.reduction.get("merged", {}).get("merged", {})

    @property
    def table_one(self) -> TableOne | None:
        return TableOne.of(self.reduction, self.merging) if self.merging else None

    @cached_property
    def findings(self) -> list[str]:
        """What is wrong with the sample or the beam, as far as the images and crystals show it."""
        return findings(self.images, [b_factor for _, b_factor in self.scales])

    @property
    def warnings(self) -> list[str]:
        """What a user must know before believing the numbers, most important first."""
        warnings = [warning for warning in [self.gain.get("warning")] if warning]
        warnings += [*self.findings, *self.reduction.get("warnings", [])]
        state = self.run.get("state", "")
        if state == "not_reduced":
            warnings.append(f"the crystals are not merged: {self.run.get('reduction', {}).get('reason', 'refused')}")
        if state == "too_many_failures":
            warnings.append("the run was stopped because too many images failed in one way")
        if self.geometry.get("converged") is False:
            warnings.append("the geometry refinement did not converge")
        counts = self.counts
        unread = sum(n for reason, n in self.failures.items() if reason.startswith(("read: ", "crash: ", "timeout: ")))
        if unread > _MANY_UNREAD * max(counts["images"], 1):
            warnings.append(f"{unread} of {counts['images']} images could not be read or processed")
        if counts["hits"] and counts["indexed"] < _FEW_INDEXED * counts["hits"]:
            warnings.append(f"only {counts['indexed']} of {counts['hits']} hits are indexed")
        return warnings

    @property
    def verdict(self) -> tuple[str, str]:
        """The state of the data in a word or three, and the evidence in a sentence."""
        counts, merged = self.counts, self.merged
        if self.run and not self.reduction and self.run.get("state") in ("running", "reducing", "stopped"):
            return RUNNING, f"{counts['images']} of {self.run.get('n_images', '?')} images are done"
        if self.assessment and not counts["images"] and not merged:
            return RUNNING, "the crystals are assessed; unit cell and space group are to be chosen"
        if self.run and not counts["crystals"] and not merged:
            return NOTHING, "no crystal was integrated"
        if not merged:
            if self.reduction.get("state") == "nothing_left":
                return NOTHING, f"nothing was merged: {self.reduction.get('reason', '')}"
            return RUNNING, f"{counts['crystals']} crystals are integrated, none are merged"
        cc, complete = merged.get("cc_one_half"), merged.get("completeness", 0.0)
        evidence = (
            f"{merged['n_crystals']} crystals merged to {merged['d_min']:.2f} Å: CC1/2 "
            f"{'unknown' if cc is None else f'{cc:.3f}'}, completeness {complete:.1f}%, multiplicity "
            f"{merged.get('multiplicity', 0.0):.1f}"
        )
        if cc is None or cc < _NO_SIGNAL or complete < _TOO_INCOMPLETE:
            return UNUSABLE, evidence
        return (WARNED if self.warnings else GOOD), evidence

    def forecast(self, d_min: float | None = None) -> Forecast | None:
        """Crystals needed for CC1/2 of 0.3 at `d_min`, by default a tenth beyond where the data end now."""
        if not self.merged or not self.merging:
            return None
        wanted = d_min or 0.9 * self.merged["d_min"]
        low, high = (np.array(self.merging[f"d_star_sq_{end}"], float) for end in ("max", "min"))
        return forecast(
            (0.5 * (low + high)).tolist(),
            self.merging["cc_one_half"],
            self.merging["cc_one_half_sd"],
            self.merged["n_crystals"],
            wanted,
            WANTED_CC_HALF,
        )


def _scales(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logarithm of the scale and B of the merged crystals of each file that was reduced."""
    found = []
    paths = sorted((folder / "data_reduction").glob("scales_*.npz"), key=lambda path: int(path.stem.split("_")[-1]))
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as content:
                kept = content["fate"] == 0
                found.append((content["log_k"][kept], content["b_factor"][kept]))
        except (OSError, ValueError, KeyError):
            continue
    return found
