"""Exports read back: which a run holds, and where each has its parts. `training.export` writes them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from kinema.config.schema import ModelConfig
from kinema.errors import UserError

DESCRIPTION = "kinema.json"
"""The file that says what an export is; a directory that has it is complete."""
EXPORT = "step-"
"""How an export's name begins; its step follows."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Export:
    """An export as read: the model that it belongs to, and the adapter file if it is one."""

    step: int
    model: ModelConfig
    adapters: dict[str, Path]
    """By the part that each belongs to; empty for whole weights."""


def step_of(path: Path) -> int:
    """The step that an export of `list_exports` is of, by its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def list_exports(root: Path) -> list[Path]:
    """Complete exports, the oldest first. Directories of other names (a copy that somebody made) are none of them."""
    found = [path for path in root.glob(f"{EXPORT}*") if _NAME.fullmatch(path.name) and (path / DESCRIPTION).is_file()]
    return sorted(found, key=step_of)


def read_export(path: Path) -> Export | None:
    """What an export (or the newest of a run directory) holds; None if ``path`` is neither.

    ``model`` says where every part lies: the trained network in the export, the others where they were. An
    adapter goes onto ``model``'s network. UserError for a description that is damaged or of something else.
    """
    if not (path / DESCRIPTION).is_file():
        found = [*list_exports(path / "exports"), *list_exports(path)]
        if not found:
            return None
        path = found[-1]
    try:
        facts = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        model = facts["model"]
        for part, place in facts["weights"].items():
            model[part] = {**model.get(part, {}), "path": str(path / place)}
        adapters = {part: path / place for part, place in facts["adapters"].items()}
        return Export(int(facts["step"]), ModelConfig.model_validate(model), adapters)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # pydantic's is a ValueError
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error).replace("\n", " ")
        raise UserError(
            f"{path}: its {DESCRIPTION} does not describe an export that this kinema reads ({what}). Copy the export "
            "again from where it came from, or give the weights themselves, which lie beside it."
        ) from None
