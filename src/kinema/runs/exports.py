"""Exports read back: which a run holds, and where each has its parts. `training.export` writes them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from kinema.config.schema import ModelConfig

DESCRIPTION = "kinema.json"
"""The file that says what an export is; a directory that has it is complete."""
EXPORT = "step-"
"""How an export's name begins; its step follows."""
_NAME = re.compile(r"step-(\d{8,})(?:-\d+)?")


@dataclass(frozen=True)
class Export:
    """An export as read: the model that it belongs to, and the adapter file if it is one."""

    step: int
    model: ModelConfig
    adapters: dict[str, Path]
    """By the part that each belongs to; empty for whole weights."""


def step_of(path: Path) -> int:
    """The step that an export is of, by its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def list_exports(root: Path) -> list[Path]:
    """Complete exports, the oldest first."""
    return sorted(path for path in root.glob(f"{EXPORT}*") if (path / DESCRIPTION).is_file())


def read_export(path: Path) -> Export | None:
    """What an export (or the newest of a run directory) holds; None if ``path`` is neither.

    ``model`` says where every part lies: the trained network in the export, the others where they were. An
    adapter goes onto ``model``'s network.
    """
    if not (path / DESCRIPTION).is_file():
        found = [*list_exports(path / "exports"), *list_exports(path)]
        if not found:
            return None
        path = found[-1]
    facts = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    model = facts["model"]
    for part, place in facts["weights"].items():
        model[part] = {**model.get(part, {}), "path": str(path / place)}
    adapters = {part: path / place for part, place in facts["adapters"].items()}
    return Export(facts["step"], ModelConfig.model_validate(model), adapters)
