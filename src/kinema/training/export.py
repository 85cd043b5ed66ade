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

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.adapters.write import DIFFUSERS_FILE, by_file, file_metadata, save_adapter
from kinema.config.schema import Config, ModelConfig
from kinema.config.write import to_toml
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.runs.exports import DESCRIPTION, EXPORT, list_exports

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from kinema.adapters.state import Adapter
    from kinema.families.base import Family
    from kinema.parallel.mesh import World

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
    from safetensors import SafetensorError

    target = root / f"{EXPORT}{step:08d}"
    is_adapter = config.adapter is not None
    dtype = torch_dtype(config.export.dtype)
    states = {part: _gathered(one, is_adapter, dtype, world) for part, one in networks.items()}
    adapters = [_adapter(one, part, states[part], world) for part, one in networks.items() if is_adapter]
    problem = None
    if world.is_main:
        partial = root / f"{_WRITING}{target.name}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            job = _Writing(partial, step, family, config, tuple(networks))
            if is_adapter:
                _write_adapters(job, adapters)
            for part, state in states.items() if not is_adapter else ():
                _write_network(job, part, state, networks[part])
            _write_description(job)
            _publish(partial, target)
            _rotate(root, config.export.keep)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            why = getattr(error, "strerror", None) or error
            problem = f"cannot write the export {target}: {why}. Free some space or change run.dir."
    problem = world.broadcast_object(problem)
    if problem is not None:
        raise UserError(problem)
    return target


def _gathered(network: nn.Module, is_adapter: bool, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    """The weights on the CPU, whole, in ``dtype``, by their diffusers names; empty on all but the main rank."""
    from kinema.adapters.inject import adapter_state, diffusers_name
    from kinema.parallel.lanes import collected
    from kinema.parallel.packing import packings, whole

    state: dict[str, Tensor] = {}
    packed = packings(network)
    if is_adapter:
        packed = {diffusers_name(name) or name: packing for name, packing in packed.items()}
    here = adapter_state(network) if is_adapter else network.state_dict()
    for name, value in collected(here, lambda name, value: whole(value, packed.get(name)).detach(), world):
        if world.is_main:
            state[name] = (value.to(dtype) if value.is_floating_point() else value).cpu()
    return state


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


def _write_network(job: _Writing, part: str, state: Mapping[str, Tensor], network: nn.Module) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in state.items()}
    metadata = {"format": "pt", **job.metadata()}
    is_network = part.startswith("network")
    for layout, place in job.places(part).items():
        path = job.directory / place
        path.parent.mkdir(exist_ok=True)
        if layout == "diffusers":
            path.mkdir()
            (path / "config.json").write_text(_network_config(network), encoding="utf-8")
            # Original names of a text encoder are those that every version of transformers reads.
            ours = tensors if is_network else job.family.to_original(tensors, part)
            _write_shards(path, "diffusion_pytorch_model" if is_network else "model", ours, metadata)
        else:
            prefix = "model.diffusion_model." if is_network else ""
            original = job.family.to_original(tensors, part)
            save_file({f"{prefix}{name}": v.contiguous() for name, v in original.items()}, path, metadata)


def _write_shards(folder: Path, stem: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """diffusers' (or transformers') file names, and their index where there are several files."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(
        tensors,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for filename, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / filename, metadata)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _network_config(network: nn.Module) -> str:
    """diffusers' or transformers' ``config.json``, under the name of the class that FSDP2 derived from."""
    from torch.distributed.fsdp import FSDPModule

    name = next(kind.__name__ for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
    if hasattr(network, "to_json_string"):
        facts = json.loads(network.to_json_string()) | {"_class_name": name}
    else:
        facts = json.loads(network.config.to_json_string()) | {"architectures": [name]}
    facts.pop("_name_or_path", None)  # a path on this machine
    return json.dumps(facts, indent=2, sort_keys=True) + "\n"


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
