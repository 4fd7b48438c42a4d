"""How far the panels of a refined detector are from where they truly are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PanelErrors:
    """Found less true, of each panel, in its own true frame; without the turn about the beam that no still shows.

    Attributes
    ----------
    in_plane_mm
        Distance of its middle from the true one within the panel.
    along_beam_mm
        The same along its normal, positive away from the crystal.
    turn_deg, tilt_deg
        Angles of the rotation about its normal, and about the axes in it together.
    shift_mm
        Mean over the panels along x, y and z of the laboratory.
    """

    in_plane_mm: tuple[float, ...]
    along_beam_mm: tuple[float, ...]
    turn_deg: tuple[float, ...]
    tilt_deg: tuple[float, ...]
    shift_mm: tuple[float, float, float]


def panel_errors(true: Any, found: Any, which: np.ndarray | None = None) -> PanelErrors:
    """Compare two dxtbx detectors of the same panels, of which the mask `which` may choose some."""
    pairs = [(_square(a), _square(b), _middle(a), _middle(b)) for a, b in zip(true, found)]
    if len(true) != len(found):
        raise ValueError(f"{len(found)} panels instead of {len(true)}")
    if which is not None:
        pairs = [pair for pair, chosen in zip(pairs, which) if chosen]
    frames, other_frames, middles, other_middles = (np.array(each) for each in zip(*pairs))
    turn = _common_turn(middles, other_middles)
    other_frames, other_middles = turn @ other_frames, other_middles @ turn.T
    away = other_middles - middles
    shift = np.einsum("nji,nj->ni", frames, away)
    # rotation of the found panel in the axes of the true one; its antisymmetric part is the vector of a small one
    rotation = frames.transpose(0, 2, 1) @ other_frames
    vector = 0.5 * np.stack(
        [
            rotation[:, 2, 1] - rotation[:, 1, 2],
            rotation[:, 0, 2] - rotation[:, 2, 0],
            rotation[:, 1, 0] - rotation[:, 0, 1],
        ],
        axis=1,
    )
    outwards = np.sign(np.einsum("ni,ni->n", frames[:, :, 2], middles))
    x, y, z = away.mean(axis=0).tolist()
    return PanelErrors(
        tuple(np.hypot(shift[:, 0], shift[:, 1]).tolist()),
        tuple((shift[:, 2] * outwards).tolist()),
        tuple(np.degrees(vector[:, 2]).tolist()),
        tuple(np.degrees(np.hypot(vector[:, 0], vector[:, 1])).tolist()),
        (x, y, z),
    )


def table_rows(errors: PanelErrors) -> list[tuple[str, str]]:
    """Medians and largest errors as rows for :func:`ssx_mpi.simulation.truth.table`."""
    names = (
        ("panels: errors in their planes", errors.in_plane_mm, 1e3, "um"),
        ("along their normals", errors.along_beam_mm, 1e3, "um"),
        ("turns about these", errors.turn_deg, 1e3, "millidegrees"),
        ("tilts", errors.tilt_deg, 1e3, "millidegrees"),
    )
    rows = []
    for name, values, scale, unit in names:
        size = scale * np.abs(values)
        rows.append((name, f"median {np.median(size):.1f}, largest {size.max():.1f} {unit}"))
    return rows


def _middle(panel: Any) -> np.ndarray:
    width, height = panel.get_image_size_mm()
    return np.array(panel.get_lab_coord((width / 2, height / 2)))


def _square(panel: Any) -> np.ndarray:
    return np.stack([panel.get_fast_axis(), panel.get_slow_axis(), panel.get_normal()], axis=1)


def _common_turn(true: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Rotation about z that brings the points `found` (n, 3) closest to the `true` ones."""
    a, b = true[:, :2] @ [1, 1j], found[:, :2] @ [1, 1j]
    # about the beam: a common shift is an error of the beam centre, not a turn
    angle = np.angle(np.sum((a - a.mean()) * np.conj(b - b.mean()))) if len(true) > 1 else 0.0
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
