"""Weights in the layouts that other tools read, apart from training state.

An export is a directory ``step-00001000`` in the run's ``exports``:

- ``diffusers/``: ``pytorch_lora_weights.safetensors`` of an adapter, ``transformer/`` of a whole network;
- ``kohya/<run>-step1000.safetensors``, ``peft/``: an adapter in those layouts, where they are asked for;
- ``comfyui/<run>-step1000.safetensors``: an adapter under ComfyUI's names, or a whole network as one file,
  original names under ``model.diffusion_model.``, the prefix that ComfyUI and diffusers' single-file loader know;
- a text encoder that was trained whole: ``diffusers/text_encoder/`` and ``comfyui/<run>-step1000-text_encoder...``,
  which ComfyUI loads as a text encoder of its own;
- ``config.toml``, the resolved configuration, and ``kinema.json``: what this is and where the other parts
  are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from kinema.adapters.model import COMFYUI_PREFIX
from kinema.adapters.store import STEM, Writer
from kinema.adapters.write import DIFFUSERS_FILE, by_file, file_metadata, save_adapter
from kinema.config.schema import Config, ModelConfig
from kinema.config.write import to_toml
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.runs.exports import DESCRIPTION, EXPORT, list_exports
from kinema.sizes import readable_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from kinema.adapters.state import Adapter
    from kinema.families.base import Family
    from kinema.families.conversion import Stream
    from kinema.parallel.mesh import World
    from kinema.parallel.packing import Packing

P = ParamSpec("P")
T = TypeVar("T")

SHARD_BYTES = 5 * 10**9
"""Largest file of a diffusers directory."""
_WRITING = "writing-"


def export_weights(
    root: Path, step: int, family: Family, networks: Mapping[str, nn.Module], config: Config, world: World
) -> Path:
    """Write ``root/step-...`` under a temporary name and make it visible by one rename; older ones rotate.

    ``networks`` are what trains, by part name.

    Every rank calls this (sharded weights are gathered, a tensor at a time); the main rank writes. Adapter or
    whole network as ``config.adapter`` says; layouts, dtype and rotation as ``config.export``. Inside
    ``Ema.swapped()`` the averaged weights are written. Returns the export's directory. UserError on every
    rank if the disk refuses.
    """
    target = root / f"{EXPORT}{step:08d}"
    job = _Writing(root / f"{_WRITING}{target.name}", step, family, config, tuple(networks))
    attempt = _Attempt(world)
    if config.adapter is not None:
        states = {part: _gathered(one, job.dtype, world) for part, one in networks.items()}
        adapters = [_adapter(one, part, states[part], world) for part, one in networks.items()]
        attempt(_begin, job, 0)
        attempt(_write_adapters, job, adapters)
    else:
        _write_networks(job, networks, world, attempt)
    attempt(_write_description, job)
    attempt(_publish, job.directory, target)
    attempt(_rotate, root, config.export.keep)
    if attempt.failed():
        if world.is_main:
            shutil.rmtree(job.directory, ignore_errors=True)
        raise UserError(f"cannot write the export {target}: {attempt.problem}. Free some space or change run.dir.")
    return target


class _Attempt:
    """What the main process does with files, one action after the other. The first that the disk refuses ends it, while
    the other processes go on giving it tensors."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.problem: str | None = None
        """Why the disk refused, in words."""

    def __call__(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The action's result; None on the other processes, and once one was refused."""
        if not self._world.is_main or self.problem is not None:
            return None
        from safetensors import SafetensorError

        try:
            return action(*args, **kwargs)
        except (OSError, SafetensorError) as error:
            self.problem = getattr(error, "strerror", None) or str(error)
            return None

    def failed(self) -> bool:
        """Whether it was refused, on every process; they call this together."""
        self.problem = self._world.broadcast_object(self.problem)
        return self.problem is not None


def _begin(job: _Writing, need: int) -> None:
    """An empty directory on a disk that has ``need`` bytes left; OSError."""
    from kinema.runs.checkpoint_files import free_bytes

    shutil.rmtree(job.directory, ignore_errors=True)
    job.directory.mkdir(parents=True)
    free = free_bytes(job.directory)
    if need > free:
        why = f"it takes {readable_bytes(need)}, and {readable_bytes(free)} are free"
        raise OSError(errno.ENOSPC, why)


def _gathered(network: nn.Module, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    """The weights of an adapter on the CPU, whole, in ``dtype``, by their diffusers names; empty on all but the main
    process."""
    from kinema.adapters.inject import adapter_state, diffusers_name
    from kinema.parallel.packing import packings

    packed = {diffusers_name(name) or name: packing for name, packing in packings(network).items()}
    found = {}
    for name, value in _whole(adapter_state(network), packed, world):
        if world.is_main:
            found[name] = _typed(value, dtype).cpu()
    return found


def _whole(state: Mapping[str, Tensor], packed: Mapping[str, Packing], world: World) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one at a time, as `parallel.lanes.collected`."""
    from kinema.parallel.lanes import collected
    from kinema.parallel.packing import whole

    return collected(state, lambda name, value: whole(value, packed.get(name)).detach(), world)


def _typed(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _adapter(network: nn.Module, part: str, state: dict[str, Tensor], world: World) -> Adapter:
    """The adapter with these weights on a network, of which other stages of a pipeline have layers too."""
    from kinema.adapters.inject import adapter_of

    found = adapter_of(network, part)
    if world.sizes.pp > 1:
        for other in world.gather_objects(replace(found, state={})):
            ranks, alphas = {**found.ranks, **other.ranks}, {**found.alphas, **other.alphas}
            found = replace(found, ranks=ranks, alphas=alphas, on_input=found.on_input | other.on_input)
    return replace(found, state=state)


@dataclass(frozen=True)
class _Writing:
    """One export on its way to the disk, on the main rank."""

    directory: Path
    step: int
    family: Family
    config: Config
    parts: tuple[str, ...]
    """What is exported."""

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.config.export.dtype)

    @property
    def name(self) -> str:
        return self.config.run.dir.resolve().name

    def places(self, part: str) -> dict[str, str]:
        """Where each layout puts a part's weights, relative to the export."""
        folder, ending = self.family.folder(part), self.family.expert(part)
        if not ending and self.config.adapter is None and not part.startswith("network"):
            ending = part
        ending = f"-{ending}" if ending else ""
        of_adapter = DIFFUSERS_FILE.replace(".", f"{ending}.", 1)
        places = {
            "diffusers": f"diffusers/{folder if self.config.adapter is None else of_adapter}",
            "comfyui": f"comfyui/{self.name}-step{self.step}{ending}.safetensors",
            "kohya": f"kohya/{self.name}-step{self.step}{ending}.safetensors",
            "peft": "peft" if len(self.parts) == 1 else f"peft/{part}",
        }
        return {layout: places[layout] for layout in self.config.layouts}

    def metadata(self) -> dict[str, str]:
        """Header of every weight file."""
        config, variant = self.config, self.family.variant.name
        text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
        return file_metadata(
            title=f"{self.name} step {self.step}",
            base_model=config.model.network.path or config.model.path or "random weights",
            architecture=f"{self.family.name}/{variant}" + (f"/{config.adapter.type}" if config.adapter else ""),
            config_hash=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
            step=self.step,
        )


def _write_adapters(job: _Writing, adapters: Sequence[Adapter]) -> None:
    for layout in job.config.layouts:
        for sharing in by_file(adapters, layout, job.family):
            file = job.directory / job.places(sharing[0].part)[layout]
            file.parent.mkdir(exist_ok=True)
            save_adapter(file, layout, sharing, job.family, metadata=job.metadata(), dtype=job.dtype)


def _write_networks(job: _Writing, networks: Mapping[str, nn.Module], world: World, attempt: _Attempt) -> None:
    """Write whole networks in every layout, a tensor at a time: on the main process no more of them is in memory than
    what a layout makes one tensor of. All processes call it."""
    from kinema.parallel.packing import packings

    entries = {part: _entries(network, job.dtype, world) for part, network in networks.items()}
    need = sum(one.nbytes for of_part in entries.values() for one in of_part.values())
    attempt(_begin, job, need * len(job.config.layouts))
    for part, network in networks.items():
        if attempt.failed():
            return
        with ExitStack() as stack:
            files = attempt(_open, job, part, entries[part], network, stack) or []
            for name, value in _whole(network.state_dict(), packings(network), world):
                if files and attempt.problem is None:
                    here = _typed(value, job.dtype).cpu()
                    for stream, _ in files:
                        attempt(stream.put, name, here)
            for _, writer in files:
                attempt(writer.close)


def _entries(network: nn.Module, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    """Tensors without values for what is written of a network, with those of a pipeline's other stages."""
    import torch

    mine = [
        (name, value.shape, dtype if value.is_floating_point() else value.dtype)
        for name, value in network.state_dict().items()
    ]
    of_all = world.gather_objects(mine) if world.sizes.pp > 1 else [mine]
    kinds = {name: (shape, kind) for theirs in of_all for name, shape, kind in theirs}
    return {name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in kinds.items()}


def _open(
    job: _Writing, part: str, entries: Mapping[str, Tensor], network: nn.Module, stack: ExitStack
) -> list[tuple[Stream, Writer]]:
    """The files of a part in every layout, laid out, and what takes its tensors; the stack lets go of those that are
    not closed."""
    from kinema.families.conversion import Stream, traced

    metadata, files = job.metadata(), []
    is_network = part.startswith("network")
    for layout, place in job.places(part).items():
        path = job.directory / place
        path.parent.mkdir(exist_ok=True)
        is_folder = layout == "diffusers"
        # Original names of a text encoder are those that every version of transformers reads.
        conversion = traced(dict if is_folder and is_network else partial(job.family.to_original, part=part), entries)
        prefix = COMFYUI_PREFIX if is_network and not is_folder else ""
        results = {f"{prefix}{name}": value for name, value in conversion.results.items()}
        stem = STEM if is_network else "model"
        writer = Writer(path, results, metadata, SHARD_BYTES if is_folder else None, stem)
        stack.callback(writer.abandon)
        if is_folder:
            (path / "config.json").write_text(_network_config(network), encoding="utf-8")
        files.append((Stream(conversion, partial(_write_below, writer, prefix)), writer))
    return files


def _write_below(writer: Writer, prefix: str, name: str, value: Tensor) -> None:
    writer.write(f"{prefix}{name}", value)


def _network_config(network: nn.Module) -> str:
    """diffusers' or transformers' ``config.json``."""
    from kinema.runs.trained import configuration

    return json.dumps(configuration(network), indent=2, sort_keys=True) + "\n"


def _write_description(job: _Writing) -> None:
    """``config.toml``, and ``kinema.json`` for `runs.exports.read_export`."""
    from kinema import __version__

    (job.directory / "config.toml").write_text(to_toml(job.config), encoding="utf-8")
    order = ("diffusers", "peft", "comfyui", "kohya")
    places = {part: next(job.places(part)[one] for one in order if one in job.config.layouts) for part in job.parts}
    is_adapter = job.config.adapter is not None
    facts = {
        "kinema": __version__,
        "step": job.step,
        "adapters": places if is_adapter else {},
        "weights": {} if is_adapter else places,
        "model": _absolute(job.config.model, job.family, network_is_here=not is_adapter),
    }
    (job.directory / DESCRIPTION).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _absolute(model: ModelConfig, family: Family, network_is_here: bool) -> dict[str, Any]:
    """The model's configuration as it holds from any working directory; a trained network is no random
    one."""
    facts = model.model_dump(mode="json", exclude_none=True) | {"variant": family.variant.name}
    for table in (facts, *(value for value in facts.values() if isinstance(value, dict))):
        if "path" in table and Path(table["path"]).exists():
            table["path"] = str(Path(table["path"]).resolve())
    if network_is_here:
        facts["random_weights"] = False
    return facts


def _publish(partial: Path, target: Path) -> None:
    """Force the files to the disk, then rename; an export of the same step (a resumed run's) gives way."""
    from kinema.runs.checkpoint_files import sync_path

    for path in (*partial.rglob("*"), partial):
        sync_path(path)
    if target.exists():
        old = target.with_name(f"{_WRITING}replaced-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(target)
    sync_path(target.parent)


def _rotate(root: Path, keep: int | None) -> None:
    """Delete the oldest exports beyond ``keep``, and what a killed process left half written."""
    for path in root.glob(f"{_WRITING}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in list_exports(root)[: -keep if keep else 0]:
        gone = path.with_name(f"{_WRITING}deleted-{path.name}")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
