"""Planning ten million records: from a table on disk to the first batch, against limits of time and memory.

    python bench/planning.py [--rows 10000000] [--batch-size 64]

Writes a parquet table (path, text, num_frames, height, width, fps; captions of about 150 characters) and plans it in
a fresh process with ``examine = "trust"``, as a run begins: the table is opened, every record placed in one of 21
buckets (3 lengths x 7 aspect ratios), the epoch shuffled, the records of the first batch read. Then again in another
process, where kinema's copy of the table is there already. Prints seconds (the whole process, imports included), the
peak of its memory (VmHWM: also what is mapped from files) and their ratios to the limits: 60 s and 2,000 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.data.lengths import CAUSAL, ClipLengths

SECONDS, MEGABYTES = 60, 2000
BLOCK = 250_000
CONFIG = """
run.dir = "{root}/run"
model = {{ family = "wan", variant = "t2v-1.3b" }}
training = {{ steps = 1000, batch_size = {batch_size} }}
[data]
sources = [{{ path = "{root}/table.parquet" }}]
examine = "trust"
buckets = {{ resolutions = [480], frames = [1, 33, 81], fps = 16 }}
"""


def write_table(path: Path, rows: int) -> None:
    """Clips of many sizes and lengths, a tenth of them pictures, with captions of random words."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    words = np.array(
        ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), n)) for n in random.integers(3, 9, 4096)]
    )
    phrases = np.array([" ".join(random.choice(words, 6)) for _ in range(20_000)])
    sizes = np.array(
        [(1280, 640), (1200, 800), (1000, 800), (1024, 1024), (480, 640), (800, 1200), (640, 1280), (2160, 3840)]
    )
    writer = None
    for first in range(0, rows, BLOCK):
        numbers = range(first, min(first + BLOCK, rows))
        n = len(numbers)
        picture = random.random(n) < 0.1
        size = sizes[random.integers(0, len(sizes), n)]
        endings = np.where(picture, "jpg", "mp4").tolist()
        pairs = zip(numbers, endings, strict=True)
        table = pa.table({
            "path": [f"shards/{i // 10_000:06d}/videos/clip-of-the-set-{i:012d}.{ending}" for i, ending in pairs],
            "text": [" ".join(four) for four in random.choice(phrases, (n, 4)).tolist()],
            "num_frames": np.where(picture, 1, random.integers(20, 400, n)).astype(np.int32),
            "height": size[:, 0].astype(np.int32),
            "width": size[:, 1].astype(np.int32),
            "fps": np.where(picture, 0.0, random.choice([24.0, 25.0, 29.97, 30.0], n)),
        })  # fmt: skip
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


@dataclass(frozen=True)
class Wan:
    """What planning asks of a family."""

    grid: int = 16
    lengths: ClipLengths = CAUSAL


@dataclass(frozen=True)
class OneProcess:
    rank: int = 0
    size: int = 1

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


def plan(root: Path, batch_size: int) -> dict[str, Any]:
    """Everything up to the first batch, in this process: seconds of each part, and what came of it."""
    begin = time.perf_counter()
    import numpy as np

    from kinema.config.load import load_config
    from kinema.data.facts import FactStore
    from kinema.data.gather import gather
    from kinema.data.mixing import repeats_of
    from kinema.data.sampler import BatchOrder

    config = load_config(root / "plan.toml", [])
    marks = [("imports", time.perf_counter() - begin)]
    found = gather(
        config, config.data.sources, Wan(), OneProcess(), facts=FactStore(root / "store"), say=lambda line: None
    )  # fmt: skip
    items = found.items
    marks.append(("open, place", time.perf_counter() - begin))
    repeats = repeats_of(config.data.sources, np.bincount(items.source, minlength=1).tolist())
    sizes = [batch_size] * len(items.buckets)
    order = BatchOrder(items.bucket, sizes, config.run.seed, source_of=items.source, repeats=repeats)
    drawn = order.batch(0)
    marks.append(("shuffle", time.perf_counter() - begin))
    records = [items[int(i)].record for i in drawn.items]
    assert all(record.path and record.captions[0] for record in records)
    marks.append(("first batch", time.perf_counter() - begin))
    ends = [0.0, *(end for _, end in marks)]
    status = Path("/proc/self/status").read_text()
    return {
        "parts": {name: end - start for (name, end), start in zip(marks, ends[:-1], strict=True)},
        "items": len(items),
        "buckets": len(items.buckets),
        "left out": found.left_out_count,
        "steps": order.steps_per_epoch,
        "batch": len(records),
        "cpu": time.process_time(),
        "megabytes": int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)  # what the fresh processes are told
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan(options.plan, options.batch_size)))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "store").mkdir()
        (root / "plan.toml").write_text(CONFIG.format(root=root, batch_size=options.batch_size))
        write_table(root / "table.parquet", options.rows)
        print(f"{options.rows:,} records in a parquet table of {(root / 'table.parquet').stat().st_size / 1e9:.2f} GB")
        for start in ("first start", "second start"):
            measure(start, [sys.executable, __file__, "--plan", name, "--batch-size", str(options.batch_size)])


def measure(start: str, command: list[str]) -> None:
    begin = time.perf_counter()
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds = time.perf_counter() - begin
    found = json.loads(printed)
    megabytes = found["megabytes"]
    parts = ", ".join(f"{name} {spent:.1f} s" for name, spent in found["parts"].items())
    print(f"{start}: {parts}")
    print(
        f"  {found['items']:,} items in {found['buckets']} buckets, {found['left out']:,} left out, "
        f"{found['steps']:,} steps an epoch, first batch of {found['batch']}"
    )
    print(
        f"  time   {seconds:7.1f} s    ratio {seconds / SECONDS:.3f} (limit {SECONDS} s; "
        f"processor time {found['cpu']:.1f} s, which is what other work on the machine hardly changes)"
    )
    print(f"  memory {megabytes:7.0f} MB   ratio {megabytes / MEGABYTES:.3f} (limit {MEGABYTES:,} MB)")


if __name__ == "__main__":
    main()
