"""Reading latents from the cache against a raw memory map of the same bytes.

    python bench/cache_read.py [--entries 1024] [--entry-kib 512] [--rounds 7]

Writes entries of the given size, seals them, and reads all of them in random order, interleaved with reading the
same byte ranges of the same file through `numpy.memmap`. Both copy each entry into one buffer, as a batch does.
Prints medians and the ratio raw / cache (1 = as fast as the raw map) for entries that this process has read before,
and for first readings, where the cache also verifies each entry's checksum. The file is in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from kinema.data.cache import Cache, entry_key


def raw_pass(path: Path, places: list[tuple[int, int]], order: list[int], buffer: torch.Tensor) -> float:
    start = time.perf_counter()
    mapped = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    for i in order:
        offset, length = places[i]
        buffer.copy_(mapped[offset : offset + length].view(torch.float32))
    return time.perf_counter() - start


def cache_pass(cache: Cache, keys: list[bytes], order: list[int], buffer: torch.Tensor) -> float:
    start = time.perf_counter()
    for i in order:
        buffer.copy_(cache.get(keys[i])["latents"])
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, default=1024)
    parser.add_argument("--entry-kib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    floats = options.entry_kib * 256
    with tempfile.TemporaryDirectory() as folder:
        keys = [entry_key("bench", i) for i in range(options.entries)]
        with Cache(folder, segment_bytes=1 << 40, segment_entries=1 << 30) as cache:
            for i, key in enumerate(keys):
                cache.put(key, {"latents": torch.full((floats,), float(i))})
        (path,) = Path(folder).glob("*.safetensors")
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        place_of = {key: n for n, key in enumerate(sorted(keys))}
        places = [(header + place_of[key] * floats * 4, floats * 4) for key in keys]
        buffer = torch.empty(floats)
        order = np.random.default_rng(0).permutation(options.entries).tolist()
        for i in (0, options.entries // 2, options.entries - 1):
            raw_pass(path, places, [i], buffer)
            assert buffer[0] == i, "the raw map reads other bytes than the cache"
        times: dict[str, list[float]] = {"raw": [], "first": [], "again": []}
        for _ in range(options.rounds):
            cache = Cache(folder)
            times["raw"].append(raw_pass(path, places, order, buffer))
            times["first"].append(cache_pass(cache, keys, order, buffer))
            times["again"].append(cache_pass(cache, keys, order, buffer))
    size = options.entries * floats * 4
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:>6}: {seconds * 1e3:8.1f} ms  {size / seconds / 1e9:6.2f} GB/s")
    print(f"cache / raw memory map, read again: {medians['raw'] / medians['again']:.3f}")
    print(f"cache / raw memory map, first reading with checksum: {medians['raw'] / medians['first']:.3f}")


if __name__ == "__main__":
    main()
