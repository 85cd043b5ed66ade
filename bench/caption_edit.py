"""What an edited caption costs: one text among ten thousand.

    python bench/caption_edit.py [--records 10000]

Makes a folder of small pictures with a caption each, runs `kinema cache` with the text encoder of the embedded world
(pictures are left to on-line encoding, so that texts alone are cached), edits one caption and runs it again. Prints how
many texts each start encoded, the limit being 1 after the edit, and the time of the second start against the first.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from kinema.shapes.models import write_model

CONFIG = """
[run]
dir = "{root}/run"
threads = 1

[model]
family = "wan"
path = "{root}/model"
text_length = 32

[data]
sources = [{{ path = "{root}/pictures" }}]
cache = "{root}/cache"
examine = "headers"
online = ["media"]
buckets = {{ sizes = [[64, 64]], frames = [1] }}

[training]
steps = 1
batch_size = 4
precision = "fp32"
"""


def cache(config: Path) -> tuple[int, float]:
    """(texts that `kinema cache` encoded, seconds)."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "kinema", "cache", str(config)],
        capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sum(map(int, re.findall(r"^Encoding .*: (\d+) done in", done.stdout, re.M))), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "pictures").mkdir()
        rng = np.random.default_rng(0)
        for number in range(options.records):
            picture = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            picture.save(root / "pictures" / f"{number:06d}.png", compress_level=0)
            (root / "pictures" / f"{number:06d}.txt").write_text(f"a red circle moves left, number {number}")
        write_model(root / "model", num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=64)
        config = root / "train.toml"
        config.write_text(CONFIG.format(root=root))
        first, first_seconds = cache(config)
        (root / "pictures" / f"{options.records // 2:06d}.txt").write_text("a blue square moves up")
        again, again_seconds = cache(config)
    print(f"{options.records} captions: {first} texts encoded in {first_seconds:.1f} s")
    print(f"one caption edited: {again} texts encoded (limit 1) in {again_seconds:.1f} s")
    print(f"second start / first: {again_seconds / first_seconds:.3f}")


if __name__ == "__main__":
    main()
