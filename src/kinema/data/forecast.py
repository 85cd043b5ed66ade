"""How much a cache will grow, from what its first entries took, and how the work goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kinema.sizes import readable_bytes

if TYPE_CHECKING:
    from .cache import Cache, CacheFull
    from .encode import Entry

LINE_SECONDS = 10.0
MEASURED = 8
"""So many entries of an encoding are measured before its size is told: texts differ in length."""


class Forecast:
    """How many bytes are still to be written: they grow with an entry's units, at a rate that is measured.

    Told once for each encoding, as soon as it is known. Stops the work, with `CacheFull`, as soon as it is clear that
    the disk cannot hold the rest.
    """

    def __init__(self, units: Mapping[str, int], cache: Cache, ranks: int, say: Callable[[str], None]) -> None:
        """``units``: still to be written on all ranks, by encoding."""
        self.left = dict(units)
        self._cache, self._ranks, self._say = cache, ranks, say
        self._todo = dict(units)
        self._units: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._entries: dict[str, int] = {}
        self._told: set[str] = set()

    def add(self, entry: Entry, written: int) -> None:
        """Count an entry that this rank wrote; CacheFull where the rest will not fit."""
        name = entry.encoding.name
        self.left[name] = max(0, self.left.get(name, 0) - entry.units * self._ranks)
        for counts, value in ((self._units, entry.units), (self._written, written), (self._entries, 1)):
            counts[name] = counts.get(name, 0) + value
        if self.is_measured(name) and name not in self._told:
            self._told.add(name)
            total = round(self._written[name] / self._units[name] * max(self._todo.get(name, 0), self._units[name]))
            self._say(f"  {name}: about {readable_bytes(total)} in all, {self._free()} free on the disk")
        done = sum(self._entries.values())
        if done & (done - 1) == 0 or done % 256 == 0:  # often at first, when little is lost by stopping
            self._cache.require_space(self.needed())

    def is_measured(self, name: str) -> bool:
        """Whether enough entries of an encoding were written to tell the size of the rest, or there is no rest."""
        return self._entries.get(name, 0) >= MEASURED or self.left.get(name, 0) == 0

    def needed(self) -> int:
        """Bytes still to be written, on all ranks, of the encodings that have begun."""
        return sum(round(self._written[name] / self._units[name] * self.left[name]) for name in self._units)

    def tell(self) -> None:
        """Say the whole forecast, where the work stops there."""
        needed = self.needed()
        self._say(f"About {readable_bytes(needed)} are still to be written, {self._free()} are free on the disk")
        self._cache.require_space(needed)

    def explain(self, error: CacheFull) -> CacheFull:
        """The error of a full disk, with how much more will be needed."""
        needed = self.needed()
        if needed <= 0:
            return error
        return type(error)(f"{error}. About {readable_bytes(needed)} ({needed} bytes) more will be needed")

    def _free(self) -> str:
        return readable_bytes(shutil.disk_usage(self._cache.directory).free)


class Meter:
    """A line of progress when the work begins, every few seconds, and at the end; none where there is nothing to do."""

    def __init__(self, what: str, units: float, say: Callable[[str], None]) -> None:
        """``units``: those of all entries that this process is expected to make."""
        self._what, self._all, self._say = what, units, say
        self._units = self._entries = 0
        self._started = self._last = time.monotonic()

    def step(self, units: int) -> None:
        """One entry of so many units was made."""
        now = time.monotonic()
        if not self._entries:
            self._say(f"{self._what} ...")
            self._started = self._last = now
        self._entries += 1
        self._units += units
        if now - self._last > LINE_SECONDS and self._units < self._all:
            self._last = now
            left = (now - self._started) / self._units * (self._all - self._units)
            self._say(f"{self._what}: {self._units / self._all:.0%}, {left:.0f} s left")

    def finish(self) -> None:
        """The work is done."""
        if self._entries:
            self._say(f"{self._what}: {self._entries} done in {time.monotonic() - self._started:.1f} s")
