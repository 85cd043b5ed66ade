"""Reading and writing small videos whole, as arrays (PyAV)."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_video(path: Path, frames: np.ndarray, fps: int = 16, crf: int = 8) -> None:
    """Writes frames, uint8 [T, H, W, 3], as an H.264 mp4 that any player opens (yuv420p; sides must be even)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def read_video(path: Path) -> np.ndarray:
    """All frames of a video, uint8 [T, H, W, 3]."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if not frames:
        raise ValueError(f"{path} holds no video frame")
    return np.stack(frames)
