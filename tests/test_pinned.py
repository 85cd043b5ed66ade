"""Memory that is given out again."""

from __future__ import annotations

import torch

from kinema.pinned import Pool


def test_what_comes_back_is_given_out_again() -> None:
    made: list[int] = []

    def make(size: int) -> torch.Tensor:
        made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    pool = Pool(make)
    first, second = pool.take(100), pool.take(100)
    assert made == [100, 100] and first.data_ptr() != second.data_ptr()
    address = first.data_ptr()
    del first
    again = pool.take(80)
    assert (again.data_ptr(), len(again), made) == (address, 80, [100, 100]), "a smaller one fits"
    view = second.view(torch.int32)  # as long as the tensor itself is there, it is not given out
    assert pool.take(100).data_ptr() not in (again.data_ptr(), view.data_ptr()) and made == [100, 100, 100]
    del again, second, view
    assert len(pool._idle) == 3
    large = pool.take(200)
    assert made[-1] == 200 and len(pool._idle) == 2, "in the place of one that was too small"
    del large
    assert [len(one) for one in pool._idle] == [100, 100, 200]
    held = [pool.take(size) for size in (90, 150, 100)]
    assert made == [100, 100, 100, 200] and [len(one) for one in held] == [90, 150, 100]
