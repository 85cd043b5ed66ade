"""Batches built ahead of the training loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls ``build(step)`` for the steps ``first`` .. ``last`` - 1, ``depth`` ahead, in one background thread.

    What it yields depends on the steps alone, so a run that starts anew at any step sees what an unbroken one saw.
    An exception in ``build`` is raised where its batch was due, after those before it.

    >>> with Prefetcher(build, first=100, last=200) as batches:
    ...     for batch in batches:
    ...         train(batch)
    """

    def __init__(self, build: Callable[[int], T], first: int, last: int, depth: int = 2) -> None:
        self._build = build
        self._next, self._last = first, last
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: deque[Future[T]] = deque()
        self._waited = 0.0
        self._started: float | None = None
        for _ in range(max(1, depth)):
            self._submit()

    def _submit(self) -> None:
        if self._next < self._last:
            self._pending.append(self._pool.submit(self._build, self._next))
            self._next += 1

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._pending:
            raise StopIteration
        now = time.perf_counter()
        future = self._pending.popleft()
        try:
            batch = future.result()
        except BaseException:
            self.close()
            raise
        self._submit()
        if self._started is None:
            self._started = time.perf_counter()  # the first batch could not have been built ahead
        else:
            self._waited += time.perf_counter() - now
        return batch

    @property
    def wait_share(self) -> float:
        """Share of the time since the first batch that the consumer spent waiting for the next, 0 to 1."""
        if self._started is None:
            return 0.0
        return self._waited / max(time.perf_counter() - self._started, 1e-9)

    def close(self) -> None:
        """Stop building; waits for the batch that is being built. What was built ahead is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._next = self._last

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
