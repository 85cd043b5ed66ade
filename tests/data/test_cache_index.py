"""The index of the cache against a dictionary, and its files: made, believed only where they fit, safe to lose."""

import os
import random
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.data import cache_index
from kinema.data import shard as shard_module
from kinema.data.cache import Cache, entry_key
from kinema.data.segments import KEY_BYTES, LANES, entry_checksum


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {"number": torch.tensor([number]), **({"more": torch.ones(number % 5)} if number % 3 else {})}


def keys_that_collide(rng: random.Random, count: int) -> list[bytes]:
    """Random keys; of half of them several share their first 8 bytes."""
    heads = [rng.randbytes(8) for _ in range(max(1, count // 8))]
    return [(rng.choice(heads) if rng.random() < 0.5 else rng.randbytes(8)) + rng.randbytes(12) for _ in range(count)]


def find_all(cache: Cache, reference: dict[bytes, int], others: list[bytes], rng: random.Random) -> None:
    """Every way of asking agrees with the dictionary."""
    assert len(cache) == len(reference)
    listed = list(cache.keys())
    assert len(listed) == len(reference) and set(listed) == reference.keys()
    for key, number in reference.items():
        assert key in cache
        assert cache.get(key)["number"].item() == number
    assert not any(key in cache for key in others)
    asked = [*reference, *others, *others]
    rng.shuffle(asked)
    assert cache.missing(asked) == [key for key in asked if key not in reference]


@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_with_a_dictionary_however_shards_come_and_go(tmp_path: Path, seed: int):
    rng = random.Random(seed)
    reader, one, two = (Cache(tmp_path, segment_entries=40) for _ in range(3))
    reference: dict[bytes, int] = {}
    for _ in range(8):
        fresh = keys_that_collide(rng, rng.randint(1, 60))
        others = [key[:8] + rng.randbytes(12) for key in fresh] + [rng.randbytes(20) for _ in range(10)]
        for key in fresh:
            number = reference[key] = rng.randrange(10_000)
            one.put(key, tensors(number))
            if rng.random() < 0.3:
                two.put(key, tensors(number))  # in two shards
        if rng.random() < 0.6:
            one.close(), two.close()
        if rng.random() < 0.4 and (shards := sorted(tmp_path.glob("*.safetensors"))):
            one.close(), two.close()
            for cache in (reader, one, two):
                cache.refresh()
            rng.choice(shards).unlink()  # another process pruned it
            one.refresh(), two.refresh()
            reference = {key: n for key, n in reference.items() if key in one}
            assert one.missing(fresh) == [key for key in fresh if key not in reference]
        reader.refresh()
        find_all(reader, reference, others, rng)
        find_all(Cache(tmp_path), reference, others, rng)


def fill(folder: Path, entries: int, segment_entries: int) -> list[bytes]:
    keys = [entry_key("index", number) for number in range(entries)]
    with Cache(folder, segment_entries=segment_entries) as cache:
        for number, key in enumerate(keys):
            cache.put(key, tensors(number))
    return keys


def test_a_second_opening_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys = fill(tmp_path, 60, 20)
    assert len(list(tmp_path.glob("*.index"))) == 3

    def refuse(path: Path) -> bytes:
        raise AssertionError(f"the header of {path} was read")

    monkeypatch.setattr(shard_module, "build_index", refuse)
    cache = Cache(tmp_path)
    assert len(cache) == 60 and cache.missing(keys) == [] and cache.get(keys[7])["number"].item() == 7


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped", "of another", "empty", "not writable"])
def test_an_index_file_may_be_lost_or_wrong(tmp_path: Path, damage: str):
    keys = fill(tmp_path, 60, 20)
    indices = sorted(tmp_path.glob("*.index"))
    good = [path.read_bytes() for path in indices]
    for number, path in enumerate(indices):
        if damage in ("lost", "not writable"):
            path.unlink()
        if damage == "not writable":
            path.mkdir()
        data = good[number]
        changed = {
            "cut": data[:-7],
            "flipped": data[:100] + bytes([data[100] ^ 4]) + data[101:],
            "of another": good[number - 1],
            "empty": b"",
        }
        if damage in changed:
            path.write_bytes(changed[damage])
    for _ in range(2):
        cache = Cache(tmp_path)
        assert not cache.damaged
        for number, key in enumerate(keys):
            assert cache.get(key)["number"].item() == number
    if damage != "not writable":
        assert [path.read_bytes() for path in indices] == good


def test_open_caches_hold_no_file_descriptors(tmp_path: Path):
    keys = fill(tmp_path, 60, 2)
    before = len(os.listdir("/proc/self/fd"))
    cache = Cache(tmp_path)
    for key in keys:
        cache.get(key)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_takes_few_bytes_an_entry(tmp_path: Path):
    fill(tmp_path, 200, 1000)
    cache = Cache(tmp_path)
    assert sum(array.nbytes for run in cache.index._runs for array in run) == 12 * 200
    (index,) = tmp_path.glob("*.index")
    assert index.stat().st_size < 200 * (KEY_BYTES + 4 + 4 + 2 * 8) + 600


def test_many_keys_are_looked_up_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_index, "CHUNK", 100)
    keys = fill(tmp_path, 300, 70)
    stream = np.random.default_rng(0).bytes(KEY_BYTES * 700)
    others = [stream[i : i + KEY_BYTES] for i in range(0, len(stream), KEY_BYTES)]
    asked = [*others[:350], *keys, *others[350:]]
    cache = Cache(tmp_path)
    assert cache.missing(iter(asked)) == others
    assert cache.index.marked(asked).all() and not cache.index.marked(others).any()


def test_the_checksum_shows_every_change_of_a_bit_and_pages_that_changed_places():
    rng = random.Random(0)
    for size in (0, 1, 8, 4095, 8 * LANES * 4 - 1, 8 * LANES * 4, 8 * LANES * 9 + 8 * 500 + 5):
        data = rng.randbytes(size)
        right = entry_checksum([data])
        words = np.frombuffer(data, "<u8", size // 8).tolist()  # the definition, in whole numbers
        lanes = [sum(words[lane::LANES]) % 2**64 for lane in range(LANES)]
        short = b"".join(lane.to_bytes(8, "little") for lane in lanes) + data[size // 8 * 8 :]
        assert right == zlib.crc32(data if size // 8 // LANES < 4 else short)
        assert entry_checksum([memoryview(b"x" + data)[1:]]) == right  # wherever it lies in memory
        for place in rng.sample(range(size), min(size, 200)):
            changed = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
            assert entry_checksum([changed]) != right
    pages = [rng.randbytes(4096) for _ in range(64)]
    right = entry_checksum([b"".join(pages)])
    for one, other in combinations(range(64), 2):
        swapped = list(pages)
        swapped[one], swapped[other] = pages[other], pages[one]
        assert entry_checksum([b"".join(swapped)]) != right
    assert entry_checksum([b"".join([*pages[:-1], bytes(4096)])]) != right  # a page that never reached the disk
