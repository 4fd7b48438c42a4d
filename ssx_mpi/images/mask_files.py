"""Mask files of DIALS: pickles, of which nothing is loaded but what a mask needs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

# a tuple of arrays of truth values, in whichever version of DIALS and Python it was written
_NEEDED = {
    ("scitbx_array_family_flex_ext", "bool"),
    ("scitbx_array_family_flex_ext", "grid"),
    ("_codecs", "encode"),
}


class _MaskUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NEEDED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no mask needs")
        return super().find_class(module, name)


def load_mask_file(path: Path) -> tuple:
    """The ``flex.bool`` of each panel, True where a pixel may be used.

    Raises
    ------
    ValueError
        When the file is no mask: the message says why.
    OSError
        When it cannot be read.
    """
    from dials.array_family import flex

    with path.open("rb") as file:
        try:
            loaded = _MaskUnpickler(file, encoding="bytes").load()
        except Exception as error:  # unpickling what is no pickle raises nearly anything
            raise ValueError(str(error).strip() or type(error).__name__) from None
    panels = (loaded,) if isinstance(loaded, flex.bool) else loaded
    if not isinstance(panels, tuple | list) or not all(isinstance(panel, flex.bool) for panel in panels):
        raise ValueError("it holds no array of truth values for each panel")
    return tuple(panels)
