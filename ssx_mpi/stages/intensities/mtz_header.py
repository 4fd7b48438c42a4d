"""What the header of an MTZ file says: a setting and symbols that other programs know, a title and a history."""

from __future__ import annotations

from cctbx import sgtbx

from ssx_mpi import __version__

# of a line of the history, and of the title
_LINE, _TITLE = 80, 70


def change_to_named_setting(space_group: sgtbx.space_group) -> sgtbx.change_of_basis_op | None:
    """The operator to the reference setting for a setting that no table has a symbol for; None where one has.

    CCP4, gemmi and PHENIX look groups up by their symbols: ``C 1 2 1 (-z,x+y,2*x)`` means nothing to them.
    """
    if space_group.match_tabulated_settings().number():
        return None
    return space_group.type().cb_op()


def symbol(space_group: sgtbx.space_group) -> str:
    """Hermann-Mauguin symbol with blanks, as CCP4's library has it; R in hexagonal axes is H there."""
    found = space_group.match_tabulated_settings()
    if not found.number():
        return str(space_group.info())
    name = str(found.hermann_mauguin())
    if found.extension() == "H":
        return "H" + name[1:]
    return name


def new_dataset(symmetry, wavelength: float):
    """An empty cctbx MTZ data set; the indices are in one of their own, HKL_base, as CCP4 has it.

    Parameters
    ----------
    symmetry
        cctbx crystal symmetry.
    wavelength
        In angstrom.
    """
    from iotbx import mtz

    content = mtz.object()
    content.set_space_group_info(symmetry.space_group_info())
    base = content.add_crystal("HKL_base", "HKL_base", symmetry.unit_cell().parameters())
    base.set_id(0)
    indices = base.add_dataset("HKL_base", 0.0)
    indices.set_id(0)
    for label in "HKL":
        indices.add_column(label, "H")
    merged = content.add_crystal("crystal", "ssx_mpi", symmetry.unit_cell().parameters())
    merged.set_id(1)
    dataset = merged.add_dataset("merged", wavelength)
    dataset.set_id(1)
    return dataset


def complete(mtz_object, title: str, notes: list[str]) -> None:
    """Give a cctbx MTZ object its symbol, its title and its history.

    Parameters
    ----------
    notes
        Lines of the history below the name and version of the program; long ones are broken.
    """
    mtz_object.set_space_group_name(symbol(mtz_object.space_group()))
    mtz_object.set_title(title[:_TITLE])
    lines = [f"ssx_mpi {__version__}"]
    for note in notes:
        lines += [note[at : at + _LINE] for at in range(0, len(note), _LINE)]
    # cctbx puts each line before those that are there
    for line in reversed(lines):
        mtz_object.add_history(line)
