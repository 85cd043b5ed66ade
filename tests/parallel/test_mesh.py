from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from kinema.config.schema import ParallelConfig
from kinema.errors import UserError
from kinema.parallel.mesh import Sizes, World, _token, sizes_of, start


@pytest.mark.parametrize(
    ("replicate", "shard", "processes", "sizes"),
    [("auto", 1, 1, (1, 1)), ("auto", 1, 6, (6, 1)), ("auto", 2, 6, (3, 2)), (2, 3, 6, (2, 3)), (1, 8, 8, (1, 8))],
)
def test_sizes(replicate: int, shard: int, processes: int, sizes: tuple[int, int]) -> None:
    parallel = ParallelConfig(dp_replicate=replicate, dp_shard=shard)
    assert sizes_of(parallel, processes) == Sizes(dp_replicate=sizes[0], dp_shard=sizes[1])


def test_every_dimension_has_its_place() -> None:
    """As `init_device_mesh` lays ranks out: the last dimension counts fastest."""
    sizes = sizes_of(ParallelConfig(pp=2, sp=3, tp=2, dp_shard=2), 48)
    assert sizes == Sizes(pp=2, dp_replicate=2, dp_shard=2, sp=3, tp=2) and (sizes.dp, sizes.total) == (4, 48)
    ranks = torch.arange(48).view(2, 2, 2, 3, 2)
    for rank in range(48):
        place = sizes.place(rank)
        assert ranks[tuple(place[name] for name in ("pp", "dp_replicate", "dp_shard", "sp", "tp"))] == rank
    shares = {World(rank, 48, 0, torch.device("cpu"), sizes).dp_rank for rank in range(48)}
    assert shares == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("parallel", "processes", "parts"),
    [
        (ParallelConfig(dp_shard=4), 6, ("dp_shard = 4", "6 processes", "torchrun --nproc-per-node 4", "divides 6")),
        (ParallelConfig(dp_shard=2), 1, ("dp_shard = 2", "1 process", "torchrun --nproc-per-node 2")),
        (
            ParallelConfig(dp_replicate=2, dp_shard=2),
            2,
            ("dp_replicate = 2", "4 processes", "has 2", "torchrun --nproc-per-node 4"),
        ),
    ],
)
def test_sizes_that_do_not_fit(parallel: ParallelConfig, processes: int, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        sizes_of(parallel, processes)
    assert all(part in str(error.value) for part in parts), error.value


def test_one_process_needs_no_group() -> None:
    world = start(ParallelConfig(), "cpu")
    assert (world.rank, world.size, world.dp_rank, world.dp_size, world.mesh) == (0, 1, 0, 1, None)
    assert world.is_main and world.device == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    world.barrier()
    assert world.broadcast_object({"a": 1}) == {"a": 1}
    assert world.gather_objects("x") == ["x"]
    assert world.all_reduce_sum(2.5) == 2.5
    assert world.all_reduce_sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_each_try_has_a_word_of_its_own() -> None:
    """In a store that knows what the processes of the try before have said, whoever comes first."""
    store = dist.HashStore()
    words = []
    for late in (0, 2):

        def come(rank: int, late: int = late) -> str:
            time.sleep(0.3 if rank == late else 0)
            return _token(store, rank, 3)

        with ThreadPoolExecutor(3) as pool:
            (word,) = set(pool.map(come, range(3)))
        words.append(word)
    assert words[0] != words[1]
