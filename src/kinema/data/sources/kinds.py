"""What a file's name promises: a picture, a video, or something that lies beside media."""

from __future__ import annotations

import os

from kinema.data.records import Kind

IMAGE_EXTENSIONS = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".avif", ".bmp", ".tif",
        ".tiff", ".jp2", ".ppm", ".pgm", ".ico",
    }
)  # fmt: skip
VIDEO_EXTENSIONS = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts",
        ".flv", ".wmv", ".asf", ".ogv", ".3gp", ".y4m", ".mxf", ".nut", ".vob",
    }
)  # fmt: skip
SIDECARS = frozenset(
    {
        ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".toml", ".yaml", ".yml", ".md", ".npz", ".npy",
        ".safetensors", ".xmp", ".srt", ".vtt",
    }
)  # fmt: skip
"""Files that are often beside media and are no media: counted, not listed."""
SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini"))


def kind_of(name: str) -> Kind | None:
    """What a file's name promises; None where it promises no media. The content decides later, in `probe`."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in VIDEO_EXTENSIONS:
        return "video"
    return "image" if suffix in IMAGE_EXTENSIONS else None


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's: hidden, or put there by the system."""
    return name.startswith((".", "__MACOSX")) or name.lower() in SYSTEM_FILES


def shown_if_bad(name: str) -> str | None:
    """None for a name in UTF-8; any other, which no list or index can hold, with its strange bytes replaced."""
    if name.isascii():
        return None
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return None


BAD_NAME = "its name is not UTF-8: rename it"
