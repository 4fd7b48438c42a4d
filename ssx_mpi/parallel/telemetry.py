"""What the dispatch itself costs, on each rank and in all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Traffic:
    """What the dispatch itself cost on one rank."""

    messages: Counter = field(default_factory=Counter)
    bytes: int = 0
    waiting: float = 0.0
    answering: float = 0.0
    items: int = 0
    seconds: float = 0.0
    coordinates: bool = False


def summary(traffics: list[Traffic]) -> dict[str, Any]:
    """What the dispatch cost over all ranks, rank 0 first, for the end of a run."""
    items = max(1, sum(t.items for t in traffics))
    seconds = max(1e-9, sum(t.seconds for t in traffics))
    busy = [t.answering / max(1e-9, t.seconds) for t in traffics if t.coordinates]
    return {
        "messages_per_image": sum(sum(t.messages.values()) for t in traffics) / items,
        "bytes_per_image": sum(t.bytes for t in traffics) / items,
        "coordinator_busy": max(busy, default=0.0),
        "waiting": sum(t.waiting for t in traffics) / seconds,
        "seconds": traffics[0].seconds,
        "images_of_rank": [t.items for t in traffics],
        "messages": dict(sum((t.messages for t in traffics), Counter())),
    }
