"""What a run trained last."""

from __future__ import annotations

from pathlib import Path

from kinema.runs.checkpoint_list import Checkpoint, list_checkpoints
from kinema.runs.exports import list_exports, step_of


def newest(run: Path, exports: bool = True) -> Path | Checkpoint | None:
    """The newest export (a directory) or checkpoint of a run, whichever is later; of one step, the export.

    ``exports``: False for checkpoints alone, which hold the weights that are not averaged too. None where the run has
    trained nothing yet.
    """
    exported = list_exports(run / "exports") if exports else []
    checkpoint = next(reversed(list_checkpoints(run / "checkpoints")), None)
    if exported and (checkpoint is None or checkpoint.step <= step_of(exported[-1])):
        return exported[-1]
    return checkpoint
