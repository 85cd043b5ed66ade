"""Reading adapters of every layout that `kinema.adapters.write` writes, and of the tools that share them: diffusers,
PEFT, ComfyUI, Kohya, LyCORIS. Each layer keeps its own rank and alpha.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.adapters.factors import fitted, is_whole, rank_and_alpha
from kinema.adapters.names import Names, flat_names, from_original_layers, original_name
from kinema.adapters.state import IA3, LOKR, LORA_A, LORA_B, MAGNITUDE, Adapter
from kinema.adapters.targets import Modules
from kinema.adapters.write import DIFFUSERS_FILE, HEADER, PART, PEFT_CONFIG, PEFT_FILE, PEFT_PREFIX
from kinema.errors import UserError
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

_WORDS = {
    ".lora_down.weight": LORA_A,
    ".lora_up.weight": LORA_B,
    ".lora.down.weight": LORA_A,
    ".lora.up.weight": LORA_B,
    ".lora_linear_layer.down.weight": LORA_A,
    ".lora_linear_layer.up.weight": LORA_B,
    ".lora_A.default.weight": LORA_A,
    ".lora_B.default.weight": LORA_B,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".lora_magnitude_vector.default.weight": MAGNITUDE,
    ".dora_scale": MAGNITUDE,
    ".alpha": "alpha",
    **{f".{ending}": ending for ending in (LORA_A, LORA_B, MAGNITUDE, IA3, *LOKR)},
}
"""How names of tensors end in some layout -> the ending that `Adapter` has."""
_SHIFTS = {".diff": "weight", ".diff_b": "bias"}
"""How names end of what is added to a whole parameter."""
_PROCESSOR = re.compile(r"\.processor\.(to_\w+?)_lora\.(down|up)\.weight$")
_FLAT = re.compile(r"(lora_\w+|lycoris_\w+)$")

Layer = tuple[str, bool, str]
"""(part, whether the name is the original layout's, layer)."""


class UnknownLayer(UserError):
    """A layer of the file that the network has not. ``other_size``: it has one of the same name in another block."""

    def __init__(self, message: str, other_size: bool) -> None:
        super().__init__(message)
        self.other_size = other_size


@dataclass(frozen=True)
class AdapterFile:
    """What was read, by part."""

    adapters: dict[str, Adapter]
    metadata: dict[str, str] = field(default_factory=dict)


def read_adapter(path: Path, names: Names, modules: Mapping[str, Modules]) -> AdapterFile:
    """Read an adapter for a model with these adaptable ``modules`` by part (see `targets.adaptable_modules`; they may
    lie on the meta device).

    ``path`` is a file or a directory that holds one. UserError for a file that is no adapter, has tensors that cannot
    be honoured, or belongs to another model.
    """
    adapters: dict[str, Adapter] = {}
    metadata: dict[str, str] = {}
    files = locate(path)
    for file in files:
        found = _Reading(file, names, modules).read()
        for part, adapter in found.adapters.items():
            if part in adapters:
                several = ", ".join(one.name for one in files)
                raise UserError(f"{path}: expected one adapter file (.safetensors), found {several}. Name the file.")
            adapters[part] = adapter
        metadata |= found.metadata
    return AdapterFile(adapters, metadata)


def fold_file(path: Path, names: Names, networks: Mapping[str, nn.Module], factor: float = 1.0) -> None:
    """Fold an adapter's file into the weights of these networks (and text encoders), by part, ``factor`` of the way."""
    from kinema.adapters.inject import fold_adapter
    from kinema.adapters.targets import adaptable_modules

    modules = {part: adaptable_modules(network) for part, network in networks.items()}
    for part, adapter in read_adapter(path, names, modules).adapters.items():
        fold_adapter(networks[part], adapter, factor)


def locate(path: Path) -> list[Path]:
    """The adapter files at ``path``: one, or one for each part. UserError if there is none, or several."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file. Expected an adapter (.safetensors) or a directory with one.")
    for folder in (path, path / "diffusers"):
        if found := sorted(folder.glob(DIFFUSERS_FILE.replace(".", "*.", 1))):
            return found
    for folder in (path, path / "peft"):
        if found := sorted(folder.glob(PEFT_FILE)) or sorted(folder.glob(f"*/{PEFT_FILE}")):
            return found
    files = sorted(path.glob("*.safetensors"))
    for name in ("comfyui", "kohya"):
        files = files or sorted((path / name).glob("*.safetensors"))
    stems = {re.sub(r"-(high|low|expert(_\d)?)$", "", file.stem) for file in files}  # of experts
    if not files or (len(files) > 1 and len(stems) > 1):
        found_names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path}: expected one adapter file (.safetensors), found {found_names}. Name the file itself.")
    return files


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header's metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file}: no readable safetensors file ({error}). Is it complete?") from error


def split(name: str) -> tuple[str, str] | None:
    """(layer as the file calls it, ending) of a tensor's name; None if it belongs to no adapter that kinema knows."""
    if match := _PROCESSOR.search(name):
        word = {"to_out": "to_out.0"}.get(match[1], match[1])
        return f"{name[: match.start()]}.{word}", LORA_A if match[2] == "down" else LORA_B
    for ending, ours in _WORDS.items():
        if name.endswith(ending):
            return name[: -len(ending)], ours
    return None


class _Reading:
    """One file on its way to `Adapter`s."""

    def __init__(self, file: Path, names: Names, modules: Mapping[str, Modules]) -> None:
        self.file, self.names, self.modules = file, names, modules
        self.tensors, self.metadata = read_tensors(file)
        self.folders = {f"{names.folder(part)}.": part for part in modules}
        self.originals = {part: self._original_layers(part) for part in modules}
        self.flat: dict[str, Layer] = {}
        self.peft = self._peft_configs()

    def _original_layers(self, part: str) -> set[str]:
        try:
            layout = self.names.layout(part)
        except UserError:
            return set()
        return {name for layer in self.modules[part] if (name := original_name(layout, layer)) is not None}

    def read(self) -> AdapterFile:
        layers: dict[str, dict[str, Tensor]] = {}
        shifts = self._shifts()
        strange = [name for name in self.tensors if split(name) is None and name not in shifts]
        for name, value in self.tensors.items():
            if (words := split(name)) is not None:
                layers.setdefault(words[0], {})[words[1]] = value
        if strange or not layers:
            what = f"{len(strange)} tensors are none, for instance {min(strange)}" if strange else "it has no tensor"
            raise UserError(
                f"{self.file}: expected an adapter of a kind that kinema has (LoRA, DoRA, LoKr, IA3), but {what}."
            )
        placed: dict[Layer, dict[str, Tensor]] = {}
        for raw, factors in layers.items():
            if (place := self._place(raw)) in placed:
                raise UserError(f"{self.file}: {raw} and another of its layers are both {place[2]} of the network.")
            placed[place] = factors
        adapters: dict[str, Adapter] = {}
        for part in self.modules:
            ours = {layer: factors for (at, old, layer), factors in placed.items() if at == part and not old}
            theirs = {layer: factors for (at, old, layer), factors in placed.items() if at == part and old}
            found = [self._adapter(part, ours, self.peft.get(part))] if ours else []
            if theirs:
                whole = {name: value for at, name, value in shifts.values() if at == part}
                original = replace(self._adapter(part, theirs, None), shifts=whole)
                found.append(from_original_layers(original, self.names))
            if found:
                adapters[part] = self._fit(_union(found, self.file))
        return AdapterFile(adapters, self.metadata)

    def _shifts(self) -> dict[str, tuple[str, str, Tensor]]:
        """Name in the file -> (part, parameter by its original name, what is added to it), for original names. Those
        that are zero everywhere are left out: some tools write them for every norm."""
        found = {}
        for name, value in self.tensors.items():
            layer, dot, ending = name.rpartition(".")
            if f".{ending}" in _SHIFTS and layer.startswith("diffusion_model."):
                parameter = f"{layer.removeprefix('diffusion_model.')}.{_SHIFTS[dot + ending]}"
                found[name] = (self._network() if value.any() else "", parameter, value)
        return found

    # -- names -----------------------------------------------------------------------------------------------------

    def _place(self, raw: str) -> Layer:
        """Where a layer of the file belongs; UserError if nowhere."""
        name = raw.removeprefix(PEFT_PREFIX)
        found: Layer | None = None
        if _FLAT.match(name) and "." not in name:
            found = self._flat_table().get(name)
        elif name.startswith(("diffusion_model.", "model.diffusion_model.")):
            part, rest = self._network(), name.partition("diffusion_model.")[2]
            if rest in self.originals[part]:
                found = (part, True, rest)
            elif rest in self.modules[part]:
                found = (part, False, rest)
        else:
            part, rest = self._split_part(name)
            for candidate in (rest, rest.removeprefix("text_model.")):  # older transformers nest CLIP's layers
                if candidate in self.modules[part]:
                    found = found or (part, False, candidate)
            if found is None and rest in self.originals[part]:
                found = (part, True, rest)
        if found is None:
            raise UnknownLayer(self._unknown(raw), self._has_kind(raw))
        return found

    def _has_kind(self, raw: str) -> bool:
        """Whether the network has such a layer, numbers of blocks aside."""
        known = {*self._flat_table(), *(name for names in self.originals.values() for name in names)}
        known |= {name for layers in self.modules.values() for name in layers}
        plain = re.sub(r"^(base_model\.model\.)?(transformer(_2)?\.|unet\.|(model\.)?diffusion_model\.)?", "", raw)
        kinds = {re.sub(r"\d+", "0", name) for name in known}
        return bool({re.sub(r"\d+", "0", name) for name in (raw, plain)} & kinds)

    def _split_part(self, name: str) -> tuple[str, str]:
        """(part, rest) of a name that begins with the part's name in a pipeline, or with nothing."""
        for start, part in self.folders.items():
            if name.startswith(start):
                return self._network() if part == "network" else part, name.removeprefix(start)
        return self._network(), re.sub(r"^(?:transformer|unet)\.", "", name)

    def _network(self) -> str:
        """The part that names without a part belong to: what the header says, else the first."""
        said = self.metadata.get(PART)
        return said if said is not None and said in self.modules else next(iter(self.modules))

    def _flat_table(self) -> dict[str, Layer]:
        if not self.flat:
            order = sorted(self.modules, key=lambda part: part != self._network())
            for part in order:
                try:
                    layout = self.names.layout(part)
                except UserError:
                    continue
                table = flat_names(self.modules[part], self.names.kohya_prefix(part), layout)
                for name, (is_original, layer) in table.items():
                    self.flat.setdefault(name, (part, is_original, layer))
        return self.flat

    def _unknown(self, raw: str) -> str:
        other = re.match(r"(lora_te\d?)_|(text_encoder(?:_\d)?)\.|(transformer_2)\.", raw)
        if other is not None:
            return (
                f"{self.file}: it also adapts {other[1] or other[2] or other[3]} (at {raw}), which is no part that is "
                f"adapted here ({', '.join(self.modules)})."
            )
        known = [*self._flat_table()] if "." not in raw else [name for part in self.originals.values() for name in part]
        plain = raw.rpartition("diffusion_model.")[2]
        near = did_you_mean(plain, [*known, *(name for part in self.modules.values() for name in part)])
        return f"{self.file}: the network has no layer for {raw}{near} Is the adapter made for another model?"

    # -- ranks, alphas, shapes -------------------------------------------------------------------------------------

    def _peft_configs(self) -> dict[str, dict[str, Any]]:
        """PEFT's configuration by part, from diffusers' header or the file beside; {} if there is none."""
        beside = self.file.with_name(PEFT_CONFIG)
        if HEADER in self.metadata:
            packed = json.loads(self.metadata[HEADER])
            found: dict[str, dict[str, Any]] = {}
            for key, value in packed.items():
                part, rest = self._split_part(key)
                found.setdefault(part, {})[rest] = value
            return found
        return {self._network(): json.loads(beside.read_text(encoding="utf-8"))} if beside.is_file() else {}

    def _adapter(self, part: str, layers: Mapping[str, dict[str, Tensor]], config: dict[str, Any] | None) -> Adapter:
        endings = {ending for factors in layers.values() for ending in factors}
        kind: Any = "ia3" if IA3 in endings else "lokr" if endings & set(LOKR) else "lora"
        kind = "dora" if MAGNITUDE in endings and kind == "lora" else kind
        needed = {"ia3": {IA3}, "lora": {LORA_A, LORA_B}, "dora": {LORA_A, LORA_B, MAGNITUDE}, "lokr": set[str]()}[kind]
        allowed = (set(LOKR) if kind == "lokr" else needed) | {"alpha"}
        state: dict[str, Tensor] = {}
        ranks, alphas, on_input = {}, {}, set()
        for layer, factors in layers.items():
            if not (needed <= set(factors) <= allowed and is_whole(kind, factors)):
                raise UserError(
                    f"{self.file}: {layer} has {', '.join(sorted(factors))}, which is no complete {kind} layer. Is the "
                    "file complete, or does it mix several kinds?"
                )
            alpha = factors.get("alpha")
            if kind == "ia3":
                if factors[IA3].shape[0] == 1 and factors[IA3].numel() > 1 and self._reads_input(layer, config):
                    on_input.add(layer)
            else:
                given = None if alpha is None else float(alpha)
                ranks[layer], alphas[layer] = rank_and_alpha(kind, layer, factors, given, config)
            state |= {f"{layer}.{ending}": value for ending, value in factors.items() if ending != "alpha"}
        return Adapter(kind, state, ranks, alphas, part, frozenset(on_input))

    def _reads_input(self, layer: str, config: Mapping[str, Any] | None) -> bool:
        """Whether IA3 multiplies the layer's input. A vector of a convolution has the same shape either way, so PEFT's
        configuration says it."""
        listed = (config or {}).get("feedforward_modules")
        if isinstance(listed, str):
            return re.fullmatch(listed, layer) is not None
        return any(layer.endswith(end) for end in listed) if listed is not None else True

    def _fit(self, adapter: Adapter) -> Adapter:
        """The adapter with factors in the shapes of the network's layers; UserError if they are of other sizes."""
        state = dict(adapter.state)
        for layer in adapter.layers:
            weight: Tensor = _weight(self.modules[adapter.part][layer])
            factors = fitted(adapter, layer, tuple(weight.shape))
            if factors is None:
                sizes = ", ".join(f"{key} {list(value.shape)}" for key, value in adapter.factors(layer).items())
                raise UserError(
                    f"{self.file}: {layer} has {sizes}, and the network's weight there is {list(weight.shape)}. Is the "
                    "adapter made for another model, or for another size of it?"
                )
            state |= {f"{layer}.{ending}": value for ending, value in factors.items()}
        return replace(adapter, state=state)


def _weight(module: nn.Module) -> Any:
    return getattr(module, "base_layer", module).weight


def _union(found: Iterable[Adapter], file: Path) -> Adapter:
    """One adapter of several for the same part."""
    first, *rest = found
    for other in rest:
        if other.kind != first.kind:
            raise UserError(f"{file} mixes {first.kind} and {other.kind}; kinema reads files of one kind.")
        first = replace(
            first,
            state=first.state | other.state,
            ranks=first.ranks | other.ranks,
            alphas=first.alphas | other.alphas,
            on_input=first.on_input | other.on_input,
            shifts=first.shifts | other.shifts,
        )
    return first
