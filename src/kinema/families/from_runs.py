"""Parts that a training of kinema's made: a run directory or an export in the place of a model's path.

What is taken of a run is its newest export or checkpoint, whichever is later, and of a checkpoint the averaged weights
where it has them: what `kinema sample --run` draws with. So the stages of a training start from one another.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.schema import Config, ModelConfig
from kinema.errors import UserError
from kinema.runs.checkpoint_list import Checkpoint
from kinema.runs.exports import DESCRIPTION, read_export
from kinema.runs.newest import newest

if TYPE_CHECKING:
    from torch import Tensor


def is_trained(path: Path) -> bool:
    """Whether a directory is a run's or an export."""
    is_run = (path / "config.toml").is_file() and (path / "environment.json").is_file()
    return is_run or (path / DESCRIPTION).is_file()


def trained_part(path: Path, part: str, family: str, key: str) -> tuple[Path, ModelConfig]:
    """Where the weights of a part lie that a run trained whole, in a run or an export (`is_trained`): a folder or file
    of the export, or a checkpoint; and the configuration of the model that they belong to.

    ``key``: the one that led here, for messages. UserError where nothing was trained yet, or an adapter, or other
    parts, or another family.
    """
    found = path if (path / DESCRIPTION).is_file() else newest(path)
    if found is None:
        raise UserError(f"{key}: {path} holds neither an export nor a checkpoint: nothing has been trained in it yet.")
    export = None if isinstance(found, Checkpoint) else read_export(found)
    config = None if export is not None else _config_of(path)
    model = export.model if export is not None else config.model  # type: ignore[union-attr]
    if model.family != family:
        raise UserError(f"{key}: {path} is of the family {model.family}, and model.family is {family}.")
    if (export is not None and export.adapters) or (config is not None and config.adapter is not None):
        raise UserError(
            f"{key}: {path} trained an adapter, which is no whole {part}. Give what it was trained on here, and the "
            "adapter as adapter.init_from."
        )
    if isinstance(found, Checkpoint):
        from kinema.runs.trained import trained_names

        if not trained_names(found.path, part):
            raise UserError(f"{key}: {path} did not train the {part}.")
        return found.path, model
    place = getattr(model, part).path
    if place is None or not Path(place).resolve().is_relative_to(found.resolve()):
        raise UserError(f"{key}: {path} did not train the {part}.")
    return Path(place), model


def _config_of(run: Path) -> Config:
    from kinema.config.load import load_config

    return load_config(run / "config.toml")


def checkpoint_files(checkpoint: Path) -> tuple[Path, ...]:
    """The files of a checkpoint that hold tensors."""
    return tuple(sorted(checkpoint.glob("rank-*.safetensors")))


def read_checkpoint(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """The tensors of a part in a checkpoint, by the names of its model."""
    from kinema.runs.trained import read_trained

    return read_trained(checkpoint, part)
