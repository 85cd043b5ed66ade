"""Facts about networks by the names of their classes, which diffusers gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Fact = TypeVar("Fact")


def of_class(network: object, facts: Mapping[str, Fact]) -> Fact | None:
    """What is known of a network's class, or of the nearest one that it derives from; None if nothing is. FSDP2 gives
    networks classes of its own, that derive from theirs."""
    return next((facts[kind.__name__] for kind in type(network).__mro__ if kind.__name__ in facts), None)
