"""Opening a table of ten million rows, against limits of time and memory, and reading its rows at random.

    python bench/tables.py [--rows 10000000] [--kind csv|jsonl|parquet]

Writes a table with Open-Sora's columns, paths of about 60 and captions of about 150 characters, and opens it in a fresh
process; then again in another, where kinema's copy of the table is there already. Prints seconds, the peak of the
process' own memory above its imports (RssAnon: pages mapped from files are the system's to take back), the time of a
row read at random, and the ratios to the limits: 20 s, 700 MB, 50 microseconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES, MICROSECONDS = 20, 700, 50
BLOCK = 100_000
READS = 20_000
CAPTION = (
    "a slow pan over hills, where {word} crosses the lake while children wave from the shore, and the light {more}"
)
WORDS = ("a boat", "an otter", "the wind", "a swimmer", "a red kite", "morning fog", "a heron")
MORE = (
    "turns golden and falls across the water",
    "fades behind the mountains, one by one",
    "stays as it is, cold and grey",
)


def write_table(path: Path, rows: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    random = np.random.default_rng(0)
    sizes = np.array([(720, 1280), (1080, 1920), (480, 640), (1280, 720)])
    captions = [CAPTION.format(word=word, more=more) for word in WORDS for more in MORE]
    writer: Any = None
    with path.open("wb") as sink:
        for first in range(0, rows, BLOCK):
            numbers = range(first, min(first + BLOCK, rows))
            size = sizes[random.integers(0, len(sizes), len(numbers))]
            height, width = size.T
            table = pa.table({
                "path": [f"videos/part-{i // 1000:05d}/a-clip-with-a-long-name-{i:012d}.mp4" for i in numbers],
                "text": [f"{captions[i % len(captions)]}, {i:012d}" for i in numbers],
                "num_frames": random.integers(17, 400, len(numbers)),
                "height": height,
                "width": width,
                "aspect_ratio": height / width,
                "resolution": height * width,
                "fps": random.choice([24.0, 25.0, 29.97], len(numbers)),
            })  # fmt: skip
            if path.suffix == ".jsonl":
                sink.writelines(json.dumps(row).encode() + b"\n" for row in table.to_pylist())
                continue
            kind = pyarrow.csv.CSVWriter if path.suffix == ".csv" else pyarrow.parquet.ParquetWriter
            writer = writer or kind(sink, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def own_memory() -> float:
    """MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not say how much memory a process has of its own")


def open_once(path: Path, store: Path) -> dict[str, float]:
    import numpy as np
    import pyarrow.compute
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet  # noqa: F401

    from kinema.config.data import DataConfig, SourceConfig
    from kinema.data.sources.table import open_table

    config = DataConfig(sources=(SourceConfig(path=str(path)),)).sources[0]
    before = own_memory()
    peaks, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peaks.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    table = open_table(config, "bench", store)
    columns = table.columns()
    assert columns is not None and bool(columns.known.all())
    opened = time.perf_counter() - began
    rows = np.random.default_rng(0).integers(0, len(table), READS).tolist()
    for row in rows:  # once for what is read from disk
        table.record(row)
    began = time.perf_counter()
    for row in rows:
        table.record(row)
    reading = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"rows": len(table), "seconds": opened, "memory": max(peaks) - before, "row": 1e6 * reading / READS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--kind", choices=("csv", "jsonl", "parquet"), default="csv")
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)  # what the fresh processes are told
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(json.dumps(open_once(arguments.table, arguments.table.parent / "store")))
        return
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / f"table.{arguments.kind}"
        write_table(path, arguments.rows)
        print(f"{arguments.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB of {arguments.kind}")
        for what in ("first time", "again"):
            command = [sys.executable, __file__, "--table", str(path)]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
            assert found["rows"] == arguments.rows
            print(f"{what}")
            for name, unit, limit in (
                ("seconds", "s", SECONDS),
                ("memory", "MB", MEGABYTES),
                ("row", "us", MICROSECONDS),
            ):
                ratio = found[name] / limit
                print(f"  {name:8s}{found[name]:10.2f} {unit:3s} ratio to the limit of {limit} {unit}: {ratio:.3f}")


if __name__ == "__main__":
    main()
