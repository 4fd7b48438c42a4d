"""Why images gave nothing: what usually causes it, and what to try."""

from __future__ import annotations

# beginning of "stage: reason": cause, what to try
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        "read: ",
        "the file is damaged, truncated or still being written",
        "look at the file that the log names; restart=True tries it again",
    ),
    ("crash: ", "the process ended at this image more than once", "look at the image; the others are not affected"),
    (
        "timeout: ",
        "far more spots or lattices than usual, or a busy file system",
        "image_timeout= , or a mask for hot pixels",
    ),
    (
        "find_spots: ",
        "ice, salt or hot pixels give more strong pixels than crystals do, or the gain is not one",
        "mask=, spotfinding.phil with d_max, d_min, or the gain of the detector",
    ),
    (
        "index: ",
        "a beam centre, distance, wavelength or cell that is off; several crystals in the beam; too few spots",
        "let the geometry be refined (no reference_geometry=), check unit_cell= and the wavelength, max_lattices=, "
        "min_spots=",
    ),
    (
        "integrate: ",
        "too few strong spots to find the shape of reflections, or a lattice that fits by chance",
        "integration.algorithm=stills, or leave these crystals out",
    ),
)


def explained(reason: str) -> tuple[str, str]:
    """The usual cause of a reason ("stage: reason"), and what to try; empty where nothing is known."""
    return next(((cause, remedy) for start, cause, remedy in _KNOWN if reason.startswith(start)), ("", ""))
