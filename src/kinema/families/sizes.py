"""How large every part of every variant is, counted on models that hold no weights.

python -m kinema.families.sizes
"""

from __future__ import annotations

import json

from kinema.config.schema import ModelConfig
from kinema.families.catalog import SIZES
from kinema.families.registry import BUILT_IN, family_class
from kinema.families.standard import StandardFamily


def part_sizes(family: str, variant: str, known: dict[str, int] | None = None) -> dict[str, int]:
    """Parameters of each part with weights, by its name. ``known`` remembers parts that variants share."""
    known = {} if known is None else known
    bound = family_class(family)(ModelConfig(family=family, variant=variant))
    assert isinstance(bound, StandardFamily)
    counts: dict[str, int] = {}
    for part in bound.variant.parts:
        spec = bound.spec(part)
        if not spec.model:
            continue
        key = json.dumps([spec.model, dict(bound.known_config(part))], sort_keys=True, default=str)
        if key not in known:
            known[key] = sum(parameter.numel() for parameter in bound.empty(part).parameters())
        counts[part] = known[key]
    return counts


def all_sizes() -> dict[str, dict[str, dict[str, int]]]:
    """{family: {variant: {part: parameters}}} of everything that comes with kinema."""
    known: dict[str, int] = {}
    return {
        family: {variant: part_sizes(family, variant, known) for variant in family_class(family).variants}
        for family in sorted(BUILT_IN)
    }


def main() -> None:
    """Write ``configs/sizes.json``."""
    SIZES.write_text(json.dumps(all_sizes(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
