"""Which ranks are alive: heartbeats, and who has been silent for long."""

from __future__ import annotations

from collections.abc import Iterable

#: a rank that has sent nothing for so many seconds sends a heartbeat to its coordinator
BEAT = 20.0
#: a rank that has been silent for so many seconds is named, then again after twice the time, and so on
SILENT = 60.0


class Listening:
    """Which ranks have not been heard of for long, each named when the silence has doubled since the last time."""

    def __init__(self, ranks: Iterable[int], now: float) -> None:
        self._heard = dict.fromkeys(ranks, now)
        self._named: dict[int, float] = {}
        self._next_look = now

    def heard(self, rank: int, now: float) -> None:
        """`rank` sent something."""
        if rank in self._heard:
            self._heard[rank] = now
            self._named.pop(rank, None)

    def let_go(self, rank: int) -> None:
        """`rank` has done all that it will be given."""
        self._heard.pop(rank, None)

    def silent(self, now: float) -> list[tuple[int, float]]:
        """Ranks to name now, with the seconds of their silence."""
        if now < self._next_look:
            return []
        self._next_look = now + SILENT / 12
        found = []
        for rank, heard in self._heard.items():
            if now - heard >= self._named.get(rank, SILENT):
                self._named[rank] = 2 * (now - heard)
                found.append((rank, now - heard))
        return found
