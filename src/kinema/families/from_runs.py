"""Parts that a training of kinema's made: a run directory, or one of its exports or checkpoints, in the place of a
model's path.

What is taken of a run is its newest export or checkpoint, whichever is later, and of a checkpoint the averaged weights
where it has them. So the stages of a training start from one another. Where both are of one step, a part that trains
takes the checkpoint, which is not rounded; a part that does not (an adapter's base, an encoder) takes the export, which
is what other tools load and what stays while checkpoints rotate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kinema.config.model import PartConfig
from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.runs.checkpoint_list import Checkpoint, is_checkpoint, read_header, tensor_names
from kinema.runs.exports import DESCRIPTION, read_export
from kinema.runs.newest import newest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AVERAGED, RAW = "ema", "networks"
"""Groups of tensors of a checkpoint that hold networks."""


@dataclass(frozen=True)
class TrainedPart:
    """A part that a run trained whole."""

    place: Path
    """A folder or file of an export, or a checkpoint."""
    model: ModelConfig
    """The configuration of the model that it belongs to."""
    is_checkpoint: bool = False
    config: Mapping[str, Any] | None = None
    """Its own configuration, where a checkpoint says it."""


def is_run(path: Path) -> bool:
    """Whether a directory is a run's."""
    return (path / "config.toml").is_file() and (path / "environment.json").is_file()


def is_trained(path: Path) -> bool:
    """Whether a directory is a run's, an export or a checkpoint."""
    return is_run(path) or (path / DESCRIPTION).is_file() or is_checkpoint(path)


def trained_part(path: Path, part: str, model: ModelConfig, key: str) -> TrainedPart:
    """The weights of a part of ``model`` that a run trained whole, in a run, an export or a checkpoint (`is_trained`).

    ``key``: the one that led here, for messages. UserError where nothing was trained yet, or an adapter, or other
    parts, or another family.
    """
    place: Path | None = path
    if not (path / DESCRIPTION).is_file() and not is_checkpoint(path):
        place = _newest(path, "checkpoint" if _may_train(part, model) else "export")
    if place is None:
        raise UserError(f"{key}: {path} holds neither an export nor a checkpoint: nothing has been trained in it yet.")
    found, has_adapter = _of_checkpoint(place, part) if is_checkpoint(place) else _of_export(place, part)
    if found.model.family != model.family:
        raise UserError(f"{key}: {path} is of the family {found.model.family}, and model.family is {model.family}.")
    if has_adapter:
        raise UserError(
            f"{key}: {path} trained an adapter, which is no whole {part}. Give what it was trained on here, and the "
            "adapter as adapter.init_from."
        )
    inside = found.place.resolve().is_relative_to(place.resolve())
    if not inside or (found.is_checkpoint and part not in _parts_in(place)):
        raise UserError(f"{key}: {path} did not train the {part}.")
    return found


def _newest(run: Path, of_one_step: Literal["export", "checkpoint"]) -> Path | None:
    found = newest(run, of_one_step=of_one_step)
    return found.path if isinstance(found, Checkpoint) else found


def _may_train(part: str, model: ModelConfig) -> bool:
    return part.startswith("network") if model.train is None else part in model.train


def _of_checkpoint(place: Path, part: str) -> tuple[TrainedPart, bool]:
    """The part, and whether an adapter was trained."""
    meta = read_header(place)["meta"]
    trained = meta.get("trained", {})
    try:
        model = ModelConfig.model_validate(meta["config"]["model"])
        has_adapter = meta["config"]["adapter"] is not None
    except (ValueError, KeyError, TypeError) as error:  # pydantic's is a ValueError
        reason = str(error).replace("\n", " ")
        raise UserError(f"checkpoint {place}: this kinema does not read its configuration ({reason}).") from None
    model = model.model_copy(update={"variant": trained.get("variant", model.variant)})
    return TrainedPart(place, model, True, trained.get("parts", {}).get(part)), has_adapter


def _of_export(place: Path, part: str) -> tuple[TrainedPart, bool]:
    """The part, or where it was that the run began with, and whether an adapter was trained."""
    export = read_export(place)
    assert export is not None, place
    path = getattr(export.model, part, PartConfig()).path
    return TrainedPart(place.parent if path is None else Path(path), export.model), bool(export.adapters)


def _parts_in(checkpoint: Path) -> set[str]:
    """Parts that a checkpoint has tensors of."""
    names = (name.split(".", 2) for name in tensor_names(checkpoint))
    return {part for group, part, *_ in names if group in (AVERAGED, RAW)}


def in_checkpoint(model: ModelConfig, checkpoint: Path) -> ModelConfig:
    """A run's model with the parts that it trained whole in one of its checkpoints: nothing that it started from is
    needed to draw with it."""
    of_checkpoint, _ = _of_checkpoint(checkpoint, "network")
    parts = {part: getattr(model, part).model_copy(update={"path": str(checkpoint)}) for part in _parts_in(checkpoint)}
    return model.model_copy(update={**parts, "variant": of_checkpoint.model.variant, "random_weights": False})


@contextmanager
def needing_its_base(place: Path) -> Iterator[None]:
    """UserErrors inside say which run's weights brought one there: their files do not tell their configuration."""
    try:
        yield
    except UserError as error:
        raise type(error)(
            f"{place} does not say the configuration of its network, so what it was trained on has to be there: {error}"
        ) from None


# -- which export or checkpoint a run directory stands for ------------------------------------------------------------


def settled(model: ModelConfig, whole: Collection[str], earlier: ModelConfig | None = None) -> ModelConfig:
    """The configuration with an export or a checkpoint in the place of every run directory: a run that is named may go
    on, and what was trained on its weights belongs to these alone.

    ``whole``: parts that train whole. ``earlier``: the configuration that a run is resumed with, whose choice stands as
    long as that is there; UserError if it is gone, unless the part trains whole: then the checkpoint that the run is
    resumed from has its weights.
    """
    changes = {}
    for part, config in model:
        if not isinstance(config, PartConfig) or config.path is None or not is_run(Path(config.path)):
            continue
        run = Path(config.path)
        place = _newest(run, "checkpoint" if part in whole else "export")
        before = None if earlier is None else getattr(earlier, part).path
        if before is not None and Path(before).resolve().parent.parent == run.resolve():
            if is_trained(Path(before)):
                place = Path(before)
            elif part not in whole:
                raise UserError(f"model.{part}.path: {gone(Path(before))}")
        if place is not None:
            changes[part] = config.model_copy(update={"path": str(place)})
    return model.model_copy(update=changes)


def gone(place: Path) -> str:
    """What to say of an export or a checkpoint of a run that is not there any more; empty if it was none."""
    run = place.parent.parent
    if place.parent.name not in ("exports", "checkpoints") or not is_run(run):
        return ""
    now = _newest(run, "export")
    has = "nothing" if now is None else now.relative_to(run)
    return (
        f"{place} is no longer there; {run} holds {has} now, with other weights. Put it back from a copy (export.keep "
        "and checkpoint.keep say how many stay), or give the path of what to take instead."
    )


# -- reading ---------------------------------------------------------------------------------------------------------


def checkpoint_files(checkpoint: Path) -> tuple[Path, ...]:
    """The files of a checkpoint that hold tensors."""
    return tuple(sorted(checkpoint.glob("rank-*.safetensors")))


def read_checkpoint(checkpoint: Path, part: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a part in a checkpoint, by the names of its model; on the device "meta" their shapes alone."""
    from kinema.runs.trained import read_trained

    return read_trained(checkpoint, part, device)
