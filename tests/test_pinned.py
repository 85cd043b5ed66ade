"""Memory that is given out again."""

from __future__ import annotations

import torch

from kinema.pinned import Pool


def test_what_comes_back_is_given_out_again() -> None:
    made: list[int] = []

    def make(size: int) -> torch.Tensor:
        made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    settled: list[int] = []
    pool = Pool(make, lambda: settled.append(1))
    first, second = pool.take(100), pool.take(100)
    assert made == [100, 100] and first.data_ptr() != second.data_ptr()
    address = first.data_ptr()
    del first
    again = pool.take(80)
    assert (again.data_ptr(), len(again), made) == (address, 80, [100, 100]), "a smaller one fits"
    view = second.view(torch.int32)  # as long as the tensor itself is there, it is not given out
    assert pool.take(100).data_ptr() not in (again.data_ptr(), view.data_ptr()) and made == [100, 100, 100]
    del again, second, view
    assert len(pool._back) == 3
    large = pool.take(200)
    assert made[-1] == 200 and len(pool._idle) == 2, "in the place of one that was too small"
    assert settled == [1], "which copies may have been under way from"
    del large
    held = [pool.take(size) for size in (90, 100)]
    assert made == [100, 100, 100, 200]
    held.append(pool.take(100))
    assert made[-1] == 100 and [len(one) for one in pool._idle] == [200], "one twice as large is for others"
    held.append(pool.take(170))
    assert len(made) == 5 and not pool._idle and [len(one) for one in held] == [90, 100, 100, 170]
