"""A process that died or hangs ends the run of all, by name, instead of leaving the others waiting in a collective.

Every process tells the run's store that it is alive, from a thread, and how far its main thread has come. Two of them
(the first, and the second in case it is the first that is gone) look at all. Where one has not gone on for too long, or
is no longer alive, every process says so, the one that hangs prints where, and all end; torchrun then starts them again
where it may (``--max-restarts``), and the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kinema.parallel.mesh import World

if TYPE_CHECKING:
    from torch.distributed import Store

INTERVAL = 1.0
"""Seconds between two signs of life."""
DEAD_AFTER = 20.0
"""Seconds without a sign of life after which a process counts as gone: a busy machine is slow, and a library may keep
the interpreter to itself."""
LOST_AFTER = 10.0
"""The same once a collective has failed: somebody is gone, and torchrun gives the others half a minute."""
HEARD_WITHIN = 5.0
"""Seconds that the first process gives the others to hear that the run is over: the store may be in it."""
FAILED_AFTER = 10.0
"""Seconds after which a process that told of an error ends the others, if they have not come to the same error."""
LEAST = 45.0
"""Seconds that a process may always stay where it is; with five times the slowest place, where that is longer."""
FIRST = 1800.0
"""The same before the first step is done: libraries look for their best algorithms. Where a process may stay as long as
it likes, what is said of it after this time."""
EXIT_CODE = 75
"""Of a process that ends for another's sake: worth another try (sysexits' EX_TEMPFAIL)."""
_OVER = "over"
_LOST = re.compile(r"(?i)connection|peer|gloo|nccl|timed? ?out")
"""What collectives say where another process is gone."""


@dataclass
class Seen:
    """What one process has told, as another one sees it, by the clock of that one."""

    rank: int
    where: str = ""
    phase: str = "start"
    count: int = -1
    patient: bool = False
    error: str = ""
    """What ended it, if it has told of an error."""
    alive: int = -1
    moved_at: float = 0.0
    """When it was first seen at this point."""
    lived_at: float = 0.0
    """When it last showed that it lives."""

    def update(self, told: dict[str, Any], now: float) -> None:
        if told["alive"] != self.alive:
            self.alive, self.lived_at = told["alive"], now
        if told["count"] != self.count or (self.patient and not told["patient"]) or told["error"] != self.error:
            self.count, self.moved_at = told["count"], now
        self.where, self.phase, self.patient, self.error = (told[key] for key in ("where", "phase", "patient", "error"))


def find_culprit(
    processes: list[Seen], now: float, limit: float, dead_after: float = DEAD_AFTER
) -> tuple[list[int], str] | None:
    """(ranks that hold up the others, what to say of it), or None while all is well.

    Those that wait for others have come further than those they wait for; where all stand at the same point, none is to
    be told from the others.
    """
    for one in processes:
        if one.error and now - one.moved_at > FAILED_AFTER:
            return [], f"process {one.rank} ({one.where}) has failed in '{one.phase}': {one.error}"
        if now - one.lived_at > dead_after and not one.error:
            return [one.rank], (
                f"process {one.rank} ({one.where}) has been silent for {now - one.lived_at:.0f} s in '{one.phase}': it "
                "was killed or stopped, or its machine cannot be reached."
            )
    if any(one.patient or one.error for one in processes):
        return None
    least = min(one.count for one in processes)
    behind = [one for one in processes if one.count == least]
    waited = min(now - one.moved_at for one in behind)
    if waited <= limit:
        return None
    if len(behind) == len(processes):
        return [one.rank for one in behind], (
            f"all {len(processes)} processes have stood still in '{behind[0].phase}' for {waited:.0f} s, more than "
            f"{limit:.0f} s. Where each stands is printed above."
        )
    names = ", ".join(f"{one.rank} ({one.where})" for one in behind[:8])
    return [one.rank for one in behind], (
        f"process {names} has not gone on for {waited:.0f} s, more than {limit:.0f} s: it hangs in "
        f"'{behind[0].phase}' while the others wait. Where it stands is printed above."
    )


class Watch:
    """Use it around the run: ``with Watch(world, seconds) as watch``; ``watch.at("step 12: forward")`` as work goes on.

    ``seconds``: how long a process may stay where it is; None is five times the longest that it was anywhere inside the
    steps so far, at least `LEAST`. Once there are others the first step, which looks for algorithms, does not count.
    One process needs none of it: nothing is started.
    """

    def __init__(self, world: World, seconds: float | None = None) -> None:
        self.world, self.seconds = world, seconds
        self._count, self._phase, self._patient, self._alive = 0, "start", True, 0
        self._compiling, self._error = False, ""
        self._since, self._longest, self._slowest, self._steps = time.monotonic(), 0.0, 0.0, 0
        self._dead_after, self._noted = DEAD_AFTER, -1
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._processes = [Seen(rank) for rank in range(world.size)]
        self._key = ""

    def at(self, phase: str, patient: bool = False) -> None:
        """The main thread has come here. ``patient``: what follows may take as long as it likes."""
        now = time.monotonic()
        if not self._patient:
            self._longest = max(self._longest, now - self._since)
        self._phase, self._patient, self._since = phase, patient, now
        self._count += 1

    def step_done(self) -> None:
        """A step is done. What comes between steps (a preview, a checkpoint) may take as long as it likes."""
        self.at("between steps", patient=True)
        self._steps += 1
        self._slowest = self._longest if self._steps <= 2 else max(self._slowest, self._longest)
        self._longest = 0.0

    def compiles(self, begins: bool) -> None:
        """torch compiles something (``begins``) or has done so: that may take as long as it likes, at any step."""
        self._compiling, self._since = begins, time.monotonic()

    @property
    def limit(self) -> float:
        """Seconds that a process may stay at one point now."""
        if self.seconds is not None:
            return self.seconds
        return max(LEAST, 5 * self._slowest) if self._steps else FIRST

    def __enter__(self) -> Watch:
        if self.world.size > 1:
            self._key = self.world.broadcast_object(secrets.token_hex(8))  # what an earlier try said does not count
            store = self._store()
            now = time.monotonic()
            for one in self._processes:
                one.moved_at = one.lived_at = now
            self._tell(store)
            self._thread = threading.Thread(target=self._run, args=(store,), name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.world.barrier()  # nobody's silence after its end is taken for death
        elif self._thread is not None and isinstance(error, RuntimeError) and _LOST.search(str(error)):
            self._dead_after = LOST_AFTER
            # The thread finds out who is gone, says so and ends this process.
            self._thread.join(timeout=LOST_AFTER + HEARD_WITHIN + 5)
        self._done.set()
        if self._thread is None:
            return
        self._thread.join(timeout=5)
        if error is not None:
            self._error = f"{type(error).__name__}: {error}"
            with suppress(Exception):
                self._tell(self._store())  # the others wait for this process, and will hear why it does not come

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self, store: Store) -> None:
        watches = self.world.rank in (0, 1)
        while not self._done.wait(INTERVAL):
            try:
                self._tell(store)
                if store.check([_OVER]):
                    verdict = json.loads(store.get(_OVER))
                    self._end(verdict["ranks"], verdict["text"], store)
                if watches:
                    self._note()
                if watches and (found := self._look(store)) is not None:
                    # Whoever is first is heard; the other monitor's verdict is the same.
                    text = json.dumps({"ranks": found[0], "text": found[1]})
                    store.compare_set(_OVER, "", text)
            except Exception as error:  # the store is in the first process, or in torchrun's agent beside it
                if self._done.is_set():
                    return
                self._end([], f"the process that keeps the run's store cannot be reached ({error}): it has ended.")

    def _note(self) -> None:
        """Say once of a place where processes may stay as long as they like that they have been there for long."""
        now, least = time.monotonic(), min(one.count for one in self._processes)
        behind = [one for one in self._processes if one.count == least]
        waited = min(now - one.moved_at for one in behind)
        if self.world.rank == 0 and behind[0].patient and waited > FIRST and self._noted != least:
            self._noted = least
            names = ", ".join(f"{one.rank} ({one.where})" for one in behind[:8])
            print(
                f"kinema: process {names} has been in '{behind[0].phase}' for {waited / 60:.0f} minutes. That may take "
                "as long as it likes; end the run if it cannot be right.",
                file=sys.stderr,
                flush=True,
            )

    def _tell(self, store: Store) -> None:
        self._alive += 1
        told = {
            "alive": self._alive,
            "count": self._count,
            "phase": self._phase,
            "patient": self._patient or self._compiling,
            "error": self._error,
            "where": f"{socket.gethostname()}, pid {os.getpid()}",
        }
        store.set(f"at/{self.world.rank}", json.dumps(told))

    def _look(self, store: Store) -> tuple[list[int], str] | None:
        now = time.monotonic()
        for one in self._processes:
            key = f"at/{one.rank}"
            if store.check([key]):
                one.update(json.loads(store.get(key)), now)
        return find_culprit(self._processes, now, self.limit, self._dead_after)

    def _end(self, ranks: list[int], text: str, store: Store | None = None) -> None:
        """Say why, print where this process stands if it is the one, and end at once: the main thread may be anywhere,
        and nothing that it could still do would be complete."""
        with suppress(Exception):
            if self.world.rank in ranks:
                print(f"process {self.world.rank} stands here:", file=sys.stderr)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            print(f"kinema: process {self.world.rank} ends with the run: {text}", file=sys.stderr, flush=True)
            if store is not None:
                self._heard(store)
        os._exit(EXIT_CODE)

    def _heard(self, store: Store) -> None:
        """Tell the first process, which goes last: with it the store may be gone, and the others would not know why."""
        if self.world.rank:
            store.set(f"heard/{self.world.rank}", "")
        else:
            store.wait([f"heard/{rank}" for rank in range(1, self.world.size)], timedelta(seconds=HEARD_WITHIN))

    def _store(self) -> Store:
        """A connection of its own to the store of the process group: the main thread's may be waiting in it."""
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        return PrefixStore(f"kinema/watch/{self._key}", _get_default_store().clone())
