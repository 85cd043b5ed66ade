"""Reading latents from the cache against a raw memory map of the same bytes, and against other ways to store them.

    python bench/cache_read.py [--entries 512] [--entry-kib 512] [--rounds 3]

Stores the same entries in the cache (sealed; its own file is read through `numpy.memmap` too), in an LMDB database
(read as bytes, its default, and as views of its own map), as one file each for `torch.load`, and as one safetensors
file each. Then reads them in random order, a group
of 32 through each, in turns whose order is drawn anew, so that all meet the same load of the machine. Each copies every
entry into one buffer, as a batch does, and all files are in the page cache, so that no disk hides what a way costs.
Prints the medians and the ratios (1 = as fast as the raw map; above 1 = faster than the peer) of entries that this
process has read before, and of first readings, where the cache alone also verifies each entry's checksum. Times are of
the process's CPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kinema.data.cache import Cache, entry_key

GROUP = 32
Read = Callable[[int], torch.Tensor]
"""The entry with a number, as float32."""


def store(folder: Path, floats: int, keys: list[bytes]) -> None:
    """The same entries in every way."""
    for name in ("cache", "lmdb", "torch", "safetensors"):
        (folder / name).mkdir()
    database = lmdb.open(str(folder / "lmdb"), map_size=4 * floats * len(keys) * 2 + (64 << 20))
    with Cache(folder / "cache", segment_bytes=1 << 40, segment_entries=1 << 30) as cache:
        for number, key in enumerate(keys):
            latents = torch.full((floats,), float(number))
            cache.put(key, {"latents": latents})
            with database.begin(write=True) as transaction:
                transaction.put(key, latents.numpy().tobytes())
            torch.save({"latents": latents}, folder / "torch" / f"{number}.pt")
            save_file({"latents": latents}, folder / "safetensors" / f"{number}.safetensors")
    database.close()


def readers(folder: Path, floats: int, keys: list[bytes], database: lmdb.Environment) -> dict[str, Read]:
    """Every way to read, opened afresh."""
    (path,) = (folder / "cache").glob("*.safetensors")
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    row_of = {key: row for row, key in enumerate(sorted(keys))}
    places = [header + row_of[key] * floats * 4 for key in keys]
    mapped = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    cache = Cache(folder / "cache")
    as_bytes, as_views = database.begin(), database.begin(buffers=True)

    def from_torch(number: int) -> torch.Tensor:
        return torch.load(folder / "torch" / f"{number}.pt", weights_only=True)["latents"]

    return {
        "raw map": lambda number: mapped[places[number] : places[number] + floats * 4].view(torch.float32),
        "cache": lambda number: cache.get(keys[number])["latents"],
        "LMDB": lambda number: torch.frombuffer(as_bytes.get(keys[number]), dtype=torch.float32),
        "LMDB, views": lambda number: torch.frombuffer(as_views.get(keys[number]), dtype=torch.float32),
        "torch.load": from_torch,
        "safetensors": lambda number: load_file(folder / "safetensors" / f"{number}.safetensors")["latents"],
    }


def timed(read: Read, group: list[int], buffer: torch.Tensor) -> float:
    start = time.process_time()
    for number in group:
        buffer.copy_(read(number))
    seconds = time.process_time() - start
    assert buffer[0] == buffer[-1] == group[-1]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, default=512)
    parser.add_argument("--entry-kib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    floats = options.entry_kib * 256
    keys = [entry_key("bench", number) for number in range(options.entries)]
    rng = np.random.default_rng(0)
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        store(Path(name), floats, keys)
        buffer = torch.empty(floats)
        for _ in range(options.rounds):
            database = lmdb.open(f"{name}/lmdb", readonly=True, lock=False)
            ways: Any = readers(Path(name), floats, keys, database)
            order = rng.permutation(options.entries).tolist()
            for when in ("first", "again"):
                for start in range(0, options.entries, GROUP):
                    for way in rng.permutation(list(ways)).tolist():
                        seconds = timed(ways[way], order[start : start + GROUP], buffer)
                        times.setdefault((way, when), []).append(seconds)
            ways.clear()
            database.close()
    medians = {place: statistics.median(values) for place, values in times.items()}
    print(f"{options.entries} entries of {options.entry_kib} KiB")
    for (way, when), seconds in medians.items():
        speed = GROUP * floats * 4 / seconds / 1e9
        print(f"{way:>12}, {when}: {seconds / GROUP * 1e6:8.1f} us an entry  {speed:6.2f} GB/s")
    print(f"cache / raw memory map: {medians['raw map', 'again'] / medians['cache', 'again']:.3f}")
    print(f"first reading, with checksum: {medians['raw map', 'first'] / medians['cache', 'first']:.3f}")
    for peer in ("LMDB", "LMDB, views", "torch.load", "safetensors"):
        again, first = (medians[peer, when] / medians["cache", when] for when in ("again", "first"))
        print(f"cache / {peer}: {again:.2f} (first reading, with checksum: {first:.2f})")


if __name__ == "__main__":
    main()
