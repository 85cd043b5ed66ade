"""What a run trained last."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kinema.runs.checkpoint_list import Checkpoint, list_checkpoints
from kinema.runs.exports import list_exports, step_of


def newest(
    run: Path, exports: bool = True, of_one_step: Literal["export", "checkpoint"] = "export"
) -> Path | Checkpoint | None:
    """The newest export (a directory) or checkpoint of a run, whichever is later; None where the run has trained
    nothing yet.

    ``exports``: False for checkpoints alone, which hold the weights that are not averaged too. ``of_one_step``: which
    where both are of one step. An export is what other tools read, and mostly rounded to 16 bit; a checkpoint has
    the weights as they train.
    """
    exported = list_exports(run / "exports") if exports else []
    checkpoint = next(reversed(list_checkpoints(run / "checkpoints")), None)
    if exported and checkpoint is not None:
        export_step = step_of(exported[-1])
        later = checkpoint.step > export_step
        return checkpoint if later or (checkpoint.step == export_step and of_one_step == "checkpoint") else exported[-1]
    return exported[-1] if exported else checkpoint
