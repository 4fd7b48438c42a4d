"""A bar where the user looks at a terminal, also through an mpiexec that the program started; lines elsewhere."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from ssx_mpi.report.progress import TERMINAL, Progress, terminal_columns


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "given", "columns"),
    [(Terminal(), None, None), (io.StringIO(), "97", 97), (io.StringIO(), None, 0), (io.StringIO(), "wide", 0)],
)
def test_where_there_is_a_terminal(monkeypatch, stream, given, columns):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv(TERMINAL, raising=False)
    if given is not None:
        monkeypatch.setenv(TERMINAL, given)
    assert terminal_columns() == columns


def test_a_rank_behind_a_pipe_draws_a_bar_of_that_width(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv(TERMINAL, "60")
    progress = Progress("images", 50, True)
    progress.start(10)
    progress.show(40)
    progress.close()
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert "50/50" in last and len(last) == 60


def test_without_a_terminal_there_are_lines(monkeypatch, caplog):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv(TERMINAL, raising=False)
    monkeypatch.setattr("ssx_mpi.report.progress._LINE_EVERY", 0.0)
    with caplog.at_level(logging.INFO, logger="ssx_mpi"):
        progress = Progress("images", 50, True)
        progress.show(20)
        progress.close()
    assert "images: 20 of 50 images" in caplog.text and stream.getvalue() == ""


def test_other_ranks_show_nothing(monkeypatch, caplog):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("images", 50, False)
    progress.show(20)
    progress.close()
    assert stream.getvalue() == "" and caplog.text == ""
