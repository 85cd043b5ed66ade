"""What there is: families, variants, their parts and what is supported, computed from the classes themselves.

How large a part is comes from ``configs/sizes.json`` (written by `kinema.families.sizes`), so that a list of all
models builds none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

from kinema.config.layouts import AdapterType
from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.base import Family, Variant
from kinema.families.loading import CONFIGS, PartSpec
from kinema.families.registry import family_class, family_names
from kinema.families.standard import StandardFamily
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    from rich.console import RenderableType

SIZES = CONFIGS / "sizes.json"
BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
"""Bytes of one weight."""


@dataclass(frozen=True)
class Part:
    """One part of a variant."""

    name: str
    what: str
    folder: str
    parameters: int | None
    """0 for parts without weights; None where nobody has counted (families of other packages)."""
    hub: str
    """Where to look for it if the variant's repository lacks it; may be empty."""


@dataclass(frozen=True)
class Entry:
    """One variant of one family."""

    family: str
    variant: Variant
    parts: tuple[Part, ...]
    supports: tuple[str, ...]
    options: tuple[str, ...]
    """Keys of ``[model]`` that not every family reads, and this one does."""

    def part(self, name: str) -> Part:
        """One of its parts."""
        return next(part for part in self.parts if part.name == name)

    def parameters(self, *beginnings: str) -> int:
        """Weights of all parts, or of those whose names begin so."""
        chosen = [part for part in self.parts if not beginnings or part.name.startswith(beginnings)]
        return sum(part.parameters or 0 for part in chosen)

    @property
    def group(self) -> str:
        """The user guide that it belongs to: "edit", "image" or "video"."""
        return "edit" if "controls" in self.variant.conditions else self.variant.modality

    def as_json(self) -> dict[str, Any]:
        """For ``kinema models --json``; sizes in bytes are those of bf16."""
        variant = self.variant
        return {
            "name": self.family,
            "variant": variant.name,
            "modality": variant.modality,
            "parameters": variant.parameters,
            "bytes_bf16": self.parameters() * BYTES["bf16"],
            "supports": list(self.supports),
            "conditions": list(variant.conditions),
            "options": list(self.options),
            "hub": variant.hub,
            "revision": variant.revision,
            "gated": variant.gated,
            "pipeline": variant.pipeline,
            "parts": [
                {
                    "part": part.name,
                    "what": part.what,
                    "folder": part.folder,
                    "parameters": part.parameters,
                    "bytes_bf16": None if part.parameters is None else part.parameters * BYTES["bf16"],
                }
                for part in self.parts
            ],
        }


def catalog(names: Iterable[str] | None = None) -> list[Entry]:
    """Every variant of these families, by default of all, in the order in which the families name them."""
    return [entry(name, variant) for name in names or family_names() for variant in family_class(name).variants]


def entry(family: str, variant: str) -> Entry:
    """One variant; ConfigError for a family, UserError for a variant that does not exist."""
    kind = family_class(family)
    if variant not in kind.variants:
        known = ", ".join(kind.variants)
        near = did_you_mean(variant, kind.variants)
        raise UserError(f"--variant: {family} has no variant '{variant}'{near} Known: {known}.")
    bound = kind(ModelConfig(family=family, variant=variant))
    counts = _sizes().get(family, {}).get(variant, {})
    parts = tuple(_part(bound, name, counts) for name in bound.variant.parts)
    return Entry(family, bound.variant, parts, supports(bound), tuple(kind.options))


def _part(family: Family, name: str, counts: Mapping[str, int]) -> Part:
    spec = family.spec(name) if isinstance(family, StandardFamily) else PartSpec(name, family.folder(name), "unknown")
    counted = counts.get(name, family.variant.parameters if name.startswith("network") else None)
    return Part(name, spec.what, spec.folder, counted if spec.model else 0, spec.hub)


def supports(family: Family) -> tuple[str, ...]:
    """What can be done with a variant, in words.

    ``full`` and the kinds of adapters; ``fp8`` (a frozen base stored in 8 or 4 bits), ``compile``,
    ``activation_checkpointing``; ``text_encoders`` where those can train too; ``experts`` where two networks share the
    noise levels; ``first_frame``, ``last_frame``, ``controls``: what it is told besides text.
    """
    kind, trainable = type(family), family.trainable_parts()
    networks = [part for part in trainable if part.startswith("network")]
    words: list[str] = ["full"] if networks else []
    words += get_args(AdapterType) if all(family.adapter_targets(part) for part in networks) else ()
    words += ["fp8"] if isinstance(family, StandardFamily) else []
    words += ["compile", "activation_checkpointing"] if kind.blocks is not Family.blocks else []
    words += ["text_encoders"] if any(part.startswith("text_encoder") for part in trainable) else []
    words += ["experts"] if len(networks) > 1 else []
    words += [condition for condition in family.variant.conditions if condition != "text"]
    return tuple(words)


@cache
def _sizes() -> dict[str, dict[str, dict[str, int]]]:
    return dict(json.loads(SIZES.read_text(encoding="utf-8")))


def billions(count: int) -> str:
    """1418996800 -> '1.4B', 84000000 -> '84M'."""
    return f"{count / 1e9:.1f}B" if count >= 5e8 else f"{count / 1e6:.0f}M"


def gigabytes(count: float) -> str:
    """Bytes in GB (10^9 bytes): '2.8 GB'."""
    return f"{count / 1e9:.1f} GB" if count < 9.95e9 else f"{count / 1e9:.0f} GB"


def common_words(entries: Iterable[Entry]) -> list[str]:
    """What all of these support, in the usual order."""
    every = [one.supports for one in entries]
    return [word for word in every[0] if all(word in words for words in every)] if every else []


def terminal_table(entries: list[Entry]) -> RenderableType:
    """For people: at most 100 columns wide; what all support is said once, below."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    common = common_words(entries)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, align in (("family", "left"), ("variant", "left"), ("makes", "left"), ("network", "right")):
        table.add_column(name, justify=align, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("on disk", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("supports also", no_wrap=True)
    before = None
    for one in entries:
        if before not in (None, one.family):
            table.add_section()
        networks = sum(part.name.startswith("network") for part in one.parts)
        size = ("2 x " if networks == 2 else "") + billions(one.variant.parameters)
        unknown = any(part.parameters is None for part in one.parts)
        disk = "unknown" if unknown else gigabytes(one.parameters() * BYTES["bf16"])
        own = ", ".join(word for word in one.supports if word not in common)
        family = Text(one.family, style="bold") if one.family != before else ""
        gated = "*" if one.variant.gated else ""
        table.add_row(family, one.variant.name, one.variant.modality, size, disk, gated, own)
        before = one.family
    notes = Text(
        f"All support: {', '.join(common)}.\n"
        "On disk: all parts in bf16; files in fp32 take twice that.\n"
        "* The hub asks you to accept its terms first.\n"
        "Get one: kinema download FAMILY --variant VARIANT; with --dry-run it says the sizes only.\n"
        "All facts: kinema models --json."
    )
    return Group(table, notes)
