"""What a sample was made with, as its file says it: weights, adapters, type, device, versions; and the way back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.errors import UserError
from kinema.families.identity import checkpoint_identity
from kinema.families.steering import NAMES
from kinema.machine import describe_machine
from kinema.sampling.weights import Weights, find_weights, weights_at

if TYPE_CHECKING:
    import torch

VOLATILE = ("images", "weights", "weights_from", "batch", "device", "device_name", "threads", "versions", "adapters",
            "attention", "fuse_qkv")  # fmt: skip
"""Facts of a file that do not tell whether it is what is asked for: places, for contents count, and the machine."""


def weights_facts(weights: Weights, model: str | None, family: str | None, variant: str | None) -> dict[str, Any]:
    """Which weights these are, for people (a label), for `weights_of` (a place) and for comparison (identities).

    ``model``, ``family`` and ``variant`` are the options that the weights were found by. Local base weights and
    adapters are known by their content, which is hashed once and remembered; checkpoints by `checkpoint_identity`.
    """
    place: dict[str, Any]
    if weights.export is not None:
        place = {"export": str(weights.export.resolve())}
    elif weights.checkpoint is not None:
        place = {"checkpoint": str(weights.checkpoint.resolve()), "ema": weights.ema}
    else:
        assert model is not None
        here = Path(model).expanduser()
        place = {"model": str(here.resolve()) if here.exists() else model, "family": family, "variant": variant}
    facts: dict[str, Any] = {
        "weights": weights.label,
        "weights_from": place,
        "weights_identity": weights_identity(weights),
    }
    facts["adapters"] = [{"path": str(path.resolve()), "factor": factor} for path, factor in weights.adapters]
    facts["adapter_contents"] = [[_content(path), factor] for path, factor in weights.adapters]
    return facts


def weights_identity(weights: Weights) -> str:
    """32 hexadecimal digits: the same for the same weights, wherever they lie. Adapters of the command apart."""
    digest = hashlib.blake2b(weights.family.fingerprint(weights.family.variant.parts).encode(), digest_size=16)
    if weights.checkpoint is not None:
        digest.update(f"{checkpoint_identity(weights.checkpoint)} {weights.ema}".encode())
    for part, path in weights.trained:
        digest.update(f"{part} {_content(path)}".encode())
    return digest.hexdigest()


def _content(path: Path) -> str:
    from kinema.data.media import content_hash
    from kinema.families.identity import DiskMemo

    memo = DiskMemo()
    if path.is_file():
        return content_hash(path, memo)
    files = sorted(one for one in path.rglob("*") if one.is_file())
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(path)} {content_hash(file, memo)}".encode())
    return digest.hexdigest()


def image_contents(images: Sequence[Path | str], known: dict[str, str]) -> list[str]:
    """The hash of each picture's bytes; ``known`` remembers them by location."""
    from kinema.data.media import content_hash

    for image in map(str, images):
        if image not in known:
            known[image] = content_hash(image)
    return [known[str(image)] for image in images]


def machine_facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Type, device and versions. On CPUs the number of threads decides how sums are split, and so their last digits."""
    found = describe_machine(str(device))
    packages = {name: found["packages"][name] for name in ("torch", "diffusers", "transformers")}
    facts = {"dtype": str(dtype).removeprefix("torch."), "device": device.type, "device_name": found["device"]}
    if device.type == "cpu":
        facts["threads"] = found["threads"]
    return {**facts, "versions": {"kinema": found["kinema"], **packages}}


def essence(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What of an entry has to agree for a file to be what is asked for; what does not steer it says so too."""
    return dict.fromkeys(NAMES) | {key: value for key, value in entry.items() if key not in VOLATILE}


# -- the way back ----------------------------------------------------------------------------------------------------


def weights_of(stored: Mapping[str, Any], adapter: Sequence[Path | str], ema: bool | None) -> Weights:
    """The weights that a file was drawn with, from their stored place, with its adapters or with others."""
    place = stored.get("weights_from")
    if not isinstance(place, dict):
        raise UserError("The file does not say where its weights are: give them with --run or --model.")
    adapters = list(adapter) or stored_adapters(stored)
    found: Weights
    if "model" in place:
        asked = {"family": place.get("family"), "variant": place.get("variant")}
        return find_weights(None, place["model"], **asked, adapters=adapters, ema=ema)
    if "export" in place:
        if ema is not None:
            raise UserError(
                "--ema and --no-ema choose among the weights of a --run; the file was drawn with an export."
            )
        found = weights_at(export=Path(place["export"]))
    else:
        found = weights_at(checkpoint=Path(place["checkpoint"]), ema=bool(place["ema"]) if ema is None else ema)
    from kinema.sampling.weights import adapter_option

    label = stored["weights"] if ema is None else found.label
    return replace(found, label=label, adapters=tuple(adapter_option(str(one)) for one in adapters))


def stored_adapters(stored: Mapping[str, Any]) -> list[str]:
    """The adapters of a file, as the option has them."""
    return [f"{one['path']}:{one['factor']!r}" for one in stored.get("adapters", ())]


def differences(stored: Mapping[str, Any], facts: Mapping[str, Any], *, adapters: bool) -> list[str]:
    """What of the weights is not what the file was drawn with, in words; ``adapters``: look at these too."""
    found = []
    if "weights_identity" not in stored:
        found.append("the file does not say which weights it was drawn with, so they cannot be compared")
    elif stored["weights_identity"] != facts["weights_identity"]:
        found.append(f"{facts['weights']} holds other weights than the file was drawn with ({stored['weights']})")
    if adapters and stored.get("adapter_contents", []) != facts["adapter_contents"]:
        found.append("an adapter's file is not what it was")
    return found
