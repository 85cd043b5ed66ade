"""The data of a configuration, looked at as a training would: ``kinema data``."""

from __future__ import annotations

from collections.abc import Callable

from kinema.config.schema import Config
from kinema.data.inspection import Inspection
from kinema.families.registry import open_family


def inspect_sets(config: Config, say: Callable[[str], None]) -> list[Inspection]:
    """What is found in the training set and in each held-out set. No weights are needed."""
    from kinema.data.inspection import inspect_data
    from kinema.parallel.mesh import start, stop

    family = open_family(config.model)
    world = start(config.parallel)
    sets = [inspect_data(config, config.data.sources, family, world, device_count=world.dp_size, say=say)]
    for one in config.evaluation.sets:
        sets.append(inspect_data(config, one.sources, family, world, name=one.name, training=False, say=say))
    stop()
    return sets
