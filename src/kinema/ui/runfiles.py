"""What a run directory holds, read leniently: a page over a broken or unfinished run must still say what there is."""

from __future__ import annotations

import base64
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kinema.runs.exports import list_exports
from kinema.runs.metrics import read_metrics

EMBED_BYTES = 64 * 1024
"""Media files below this are put into the page itself."""
TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".jpg": "image/jpeg", ".gif": "image/gif"}


@dataclass(frozen=True)
class Media:
    """A video or picture, with its line of ``index.jsonl``."""

    path: Path
    row: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.row.get("prompt") or self.path.stem)

    @property
    def verdicts(self) -> list[tuple[str, str | None, str]]:
        """(attribute, what was read, what was asked for)."""
        judged = self.row.get("judged")
        if not isinstance(judged, Mapping):
            return []
        pairs = {name: pair for name, pair in judged.items() if isinstance(pair, list) and len(pair) == 2}
        return [(name, None if pair[0] is None else str(pair[0]), str(pair[1])) for name, pair in pairs.items()]


@dataclass
class RunFiles:
    """Everything that the report shows. Missing pieces are empty."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    batch_sizes: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Media] = field(default_factory=list)
    previews: dict[int, list[Media]] = field(default_factory=dict)
    exports: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every row that has a number under ``key``."""
        return [(row["step"], float(row[key])) for row in self.metrics if _is_number(row.get(key))]

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value


def read_run(directory: Path) -> RunFiles:
    """Read a run directory; nothing in it is required."""
    text = _text(directory / "config.toml")
    try:
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        config = {}
    rows = [row for row in read_metrics(directory / "metrics.jsonl") if isinstance(row, dict)]
    folders = sorted((directory / "previews").glob("step-*")) if (directory / "previews").is_dir() else []
    previews = {int(f.name[5:]): read_media(f) for f in folders if f.name[5:].isdigit()}
    return RunFiles(
        directory,
        config,
        text,
        _object(directory / "environment.json"),
        _object(directory / "batch_sizes.json"),
        _object(directory / "scores.json"),
        sorted((row for row in rows if _is_number(row.get("step"))), key=lambda row: row["step"]),
        read_media(directory / "samples"),
        {step: media for step, media in previews.items() if media},
        [path.name for path in list_exports(directory / "exports")],
    )


def read_media(folder: Path) -> list[Media]:
    """The media of ``index.jsonl``; without one, every media file of the folder. Files that are gone are left out."""
    rows = []
    for line in _text(folder / "index.jsonl").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        if isinstance(row, dict) and isinstance(row.get("file"), str):
            rows.append(row)
    if not rows and folder.is_dir():
        rows = [{"file": path.name} for path in sorted(folder.iterdir())]
    found = [Media(folder / row["file"], row) for row in rows]
    return [one for one in found if one.path.suffix.lower() in TYPES and one.path.is_file()]


def choose(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


class Embedder:
    """Addresses of media: ``data:`` while the file is small and the budget lasts, else relative to the page."""

    def __init__(self, root: Path, budget: int) -> None:
        self.root, self.budget = root, budget

    def address(self, path: Path) -> str:
        """What goes into ``src``."""
        if self.budget > 0 and path.stat().st_size < EMBED_BYTES:
            self.budget -= 1
            return f"data:{TYPES[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"
        return quote(path.relative_to(self.root).as_posix())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
