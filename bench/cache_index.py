"""The index of a cache of ten million entries: time to open it, memory, and looking keys up.

    python bench/cache_index.py [--entries 10000000] [--shards 700]

Writes real shards (two small tensors an entry) into a temporary directory, then opens the cache twice, each time in a
process of its own: once without index files, which it then makes, and once with them. Prints each figure against its
limit (10 s to open, 350 MB more memory than before; below 1 is within), and what `missing` takes for all keys.
Memory is the growth of the process's peak, mapped files included. A dictionary of keys, as the peer, is measured with
a tenth of the entries in the same run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import secrets
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kinema.data.segments import FORMAT, KEY_BYTES, entry_checksum

OPEN_SECONDS, MEMORY_MB = 10.0, 350.0
SPAWN = multiprocessing.get_context("spawn")


def write_shard(path: Path, rows: int) -> None:
    """A shard of random keys, each with 16 bytes of latents and 4 of text."""
    keys = sorted(secrets.token_bytes(KEY_BYTES).hex() for _ in range(rows))
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "checksums": json.dumps(dict.fromkeys(keys, entry_checksum((bytes(16), bytes(4))))),
        }
    }
    for name, first, shape in (("latents", 0, [4]), ("text", rows * 16, [1])):
        size = 4 * shape[0]
        for row, key in enumerate(keys):
            place = [first + row * size, first + (row + 1) * size]
            header[f"{key}/{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(rows * 20))


def grown_mb(since: int = 0) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - since


def measure_opening(folder: str, look_up: bool, result: Any) -> None:
    import torch

    from kinema.data.cache import Cache

    torch.empty(1)
    before, started = grown_mb(), time.perf_counter()
    cache = Cache(folder)
    found: dict[str, float] = {"open": time.perf_counter() - started, "open memory": grown_mb(before)}
    found["entries"] = len(cache)
    if look_up:
        rng = np.random.default_rng(0)
        some = [
            shard.keys[row].tobytes()
            for shard in cache.index.shards
            for row in rng.integers(0, shard.rows, 20).tolist()
        ]
        some = [some[i] for i in rng.permutation(len(some)).tolist()]
        started = time.perf_counter()
        assert all(key in cache for key in some)
        found["one key"] = (time.perf_counter() - started) / len(some)
        for key in some[::50]:
            assert cache.get(key)["latents"].tolist() == [0, 0, 0, 0]
        started = time.perf_counter()
        assert not cache.missing(cache.keys())
        found["missing, all keys"] = time.perf_counter() - started
        found["memory after all"] = grown_mb(before)
    result.send(found)


def measure_dictionary(entries: int, result: Any) -> None:
    before = grown_mb()
    table = {secrets.token_bytes(KEY_BYTES): number for number in range(entries)}
    keys = [key for key, number in table.items() if number % 1000 == 0]
    started = time.perf_counter()
    assert all(key in table for key in keys)
    result.send({"memory": grown_mb(before), "one key": (time.perf_counter() - started) / len(keys)})


def in_process(work: Any, *arguments: Any) -> dict[str, float]:
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=work, args=(*arguments, sender))
    process.start()
    found = receiver.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=700)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.shards):
            rows = options.entries * (number + 1) // options.shards - options.entries * number // options.shards
            write_shard(Path(folder) / f"{number:012x}-0000.safetensors", rows)
        first = in_process(measure_opening, folder, False)
        warm = in_process(measure_opening, folder, True)
    table = in_process(measure_dictionary, options.entries // 10)
    assert first["entries"] == warm["entries"] == options.entries
    print(f"{options.entries} entries in {options.shards} shards")
    print(f"first opening, index files are made: {first['open']:.1f} s, {first['open memory']:.0f} MB")
    print(f"opening: {warm['open']:.2f} s, of the limit {warm['open'] / OPEN_SECONDS:.2f}")
    print(f"memory: {warm['open memory']:.0f} MB, of the limit {warm['open memory'] / MEMORY_MB:.2f}")
    print(f"memory, a dictionary of keys: {table['memory'] * 10:.0f} MB (ten times that of a tenth)")
    print(f"one key: {warm['one key'] * 1e6:.1f} us; dictionary of a tenth: {table['one key'] * 1e6:.1f} us")
    print(f"missing() of all keys: {warm['missing, all keys']:.1f} s; peak then {warm['memory after all']:.0f} MB")


if __name__ == "__main__":
    main()
