"""Reading latents from the cache against a raw memory map of the same bytes.

    python bench/cache_read.py [--entries 512] [--entry-kib 512] [--rounds 3]

Writes entries of the given size, seals them, and reads them in random order: a group of 32 through the cache, the
same byte ranges of the same file through `numpy.memmap`, and so on, so that both meet the same load of the machine.
Both copy each entry into one buffer, as a batch does. Prints the medians and the ratio (1 = as fast as the raw map)
for entries that this process has read before, and for first readings, where the cache also verifies each entry's
checksum. The file is in the page cache, so no disk hides what the cache costs; times are of the process's CPU.
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

GROUP = 32


def raw_pass(mapped: torch.Tensor, places: list[tuple[int, int]], buffer: torch.Tensor) -> float:
    start = time.process_time()
    for offset, length in places:
        buffer.copy_(mapped[offset : offset + length].view(torch.float32))
    return time.process_time() - start


def cache_pass(cache: Cache, keys: list[bytes], buffer: torch.Tensor) -> float:
    start = time.process_time()
    for key in keys:
        buffer.copy_(cache.get(key)["latents"])
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, default=512)
    parser.add_argument("--entry-kib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
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
        times: dict[str, list[float]] = {"raw, first": [], "cache, first": [], "raw": [], "cache": []}
        for _ in range(options.rounds):
            cache, mapped = Cache(folder), torch.from_numpy(np.memmap(path, np.uint8, "c"))
            for suffix in (", first", ""):
                for start in range(0, options.entries, GROUP):
                    group = order[start : start + GROUP]
                    times["raw" + suffix].append(raw_pass(mapped, [places[i] for i in group], buffer))
                    assert buffer[0] == group[-1], "the raw map reads other bytes than the cache"
                    times["cache" + suffix].append(cache_pass(cache, [keys[i] for i in group], buffer))
                    assert buffer[0] == group[-1]
    size = GROUP * floats * 4
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:>12}: {seconds / GROUP * 1e6:8.1f} us an entry  {size / seconds / 1e9:6.2f} GB/s")
    print(f"cache / raw memory map: {medians['raw'] / medians['cache']:.3f}")
    print(f"cache / raw memory map, first reading with checksum: {medians['raw, first'] / medians['cache, first']:.3f}")


if __name__ == "__main__":
    main()
