"""What to cite for what a run did."""

from __future__ import annotations

# key: words for the page, entry of BibTeX
_REFERENCES: dict[str, tuple[str, str]] = {
    "dials": (
        "Winter, G. et al. (2018). DIALS: implementation and evaluation of a new integration package. "
        "Acta Cryst. D74, 85-97.",
        """@article{dials2018, author = {Winter, G. and Waterman, D. G. and Parkhurst, J. M. and Brewster, A. S. and
  Gildea, R. J. and Gerstel, M. and Fuentes-Montero, L. and Vollmar, M. and Michels-Clark, T. and
  Young, I. D. and Sauter, N. K. and Evans, G.},
  title = {{DIALS}: implementation and evaluation of a new integration package},
  journal = {Acta Cryst. D}, volume = {74}, pages = {85--97}, year = {2018}}""",
    ),
    "ellipsoid": (
        "Beilsten-Edmands, J. et al. (2024). Processing serial synchrotron crystallography diffraction data with "
        "DIALS. Methods Enzymol. 709, 207-244.",
        """@article{dials_ssx, author = {Beilsten-Edmands, J. and Parkhurst, J. M. and Winter, G. and Evans, G.},
  title = {Processing serial synchrotron crystallography diffraction data with {DIALS}},
  journal = {Methods Enzymol.}, volume = {709}, pages = {207--244}, year = {2024}}""",
    ),
    "geometry": (
        "Brewster, A. S. et al. (2018). Improving signal strength in serial crystallography with DIALS geometry "
        "refinement. Acta Cryst. D74, 877-894.",
        """@article{brewster2018, author = {Brewster, A. S. and Waterman, D. G. and Parkhurst, J. M. and
  Gildea, R. J. and Young, I. D. and O'Riordan, L. J. and Yano, J. and Winter, G. and Evans, G. and Sauter, N. K.},
  title = {Improving signal strength in serial crystallography with {DIALS} geometry refinement},
  journal = {Acta Cryst. D}, volume = {74}, pages = {877--894}, year = {2018}}""",
    ),
    "cc": (
        "Karplus, P. A. & Diederichs, K. (2012). Linking crystallographic model and data quality. Science 336, "
        "1030-1033.",
        """@article{karplus2012, author = {Karplus, P. A. and Diederichs, K.},
  title = {Linking crystallographic model and data quality}, journal = {Science}, volume = {336}, pages = {1030--1033},
  year = {2012}}""",
    ),
}


def cited(refined: bool, merged: bool) -> list[str]:
    """Keys of the references for a run that refined a geometry, and merged."""
    return ["dials", "ellipsoid", *(["geometry"] if refined else []), *(["cc"] if merged else [])]


def words(keys: list[str]) -> list[str]:
    """References as text."""
    return [_REFERENCES[key][0] for key in keys]


def bibtex(keys: list[str]) -> str:
    """References as a BibTeX file."""
    return "\n\n".join(_REFERENCES[key][1] for key in keys) + "\n"
