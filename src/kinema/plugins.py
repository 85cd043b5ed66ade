"""What other packages add, and what is built in, by name: families, objectives, optimisers.

A package adds one through an entry point of the group ``kinema.families``, ``kinema.objectives`` or
``kinema.optimizers``. Built-in ones are ``module:attribute`` and imported when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from kinema.errors import ConfigError
from kinema.suggest import did_you_mean


@dataclass(frozen=True)
class Catalog:
    """One kind of thing that has a name in the configuration."""

    what: str
    """In words, for messages."""
    key: str
    """The key of the configuration that names it."""
    group: str
    """The entry-point group of other packages."""
    built_in: Mapping[str, str]

    def names(self) -> list[str]:
        """All names, built in and installed."""
        return sorted({*self.built_in, *(point.name for point in entry_points(group=self.group))})

    def is_built_in(self, name: str) -> bool:
        """Whether it comes with kinema."""
        return name in self.built_in

    def check(self, name: str) -> None:
        """ConfigError with the nearest name if there is none of this name; imports nothing."""
        if name in self.built_in or any(point.name == name for point in entry_points(group=self.group)):
            return
        names = self.names()
        raise ConfigError(
            f"{self.key}: there is no {self.what} '{name}'{did_you_mean(name, names)} Known: {', '.join(names)}."
        )

    def load(self, name: str) -> Any:
        """The thing itself, imported; ConfigError if there is none of this name or its package cannot be imported."""
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        self.check(name)
        point = next(point for point in entry_points(group=self.group) if point.name == name)
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            package = point.dist.name if point.dist is not None else point.value
            raise ConfigError(
                f"{self.key}: the {self.what} '{name}' of the package {package} cannot be imported ({error}). "
                "Install what it needs, or ask its authors."
            ) from error


OPTIMIZERS = Catalog(
    "optimiser",
    "optimizer.type",
    "kinema.optimizers",
    {
        "adafactor": "kinema.optim.library:adafactor",
        "adamw": "kinema.optim.optimizers:adamw",
        "adamw8bit": "kinema.optim.optimizers:adamw8bit",
        "automagic": "kinema.optim.optimizers:automagic",
        "generic": "kinema.optim.generic:generic",
        "lion": "kinema.optim.library:lion",
        "muon": "kinema.optim.optimizers:muon",
        "prodigy": "kinema.optim.library:prodigy",
        "schedulefree": "kinema.optim.library:schedulefree",
    },
)
"""``(parameters, block_matrices, config.optimizer) -> optimisers``, as `kinema.optim.optimizers.build_optimizers`."""
OBJECTIVES = Catalog(
    "objective", "objective.type", "kinema.objectives", {"flow": "kinema.objectives.flow:flow_matching"}
)
"""``(config.objective, family) -> Objective``, as `kinema.objectives.flow.flow_matching`."""
