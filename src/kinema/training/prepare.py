"""The data of a configuration, examined and cached ahead of the training: ``kinema cache``."""

from __future__ import annotations

from kinema.config.schema import Config
from kinema.families.registry import open_family


def prepare_data(config: Config) -> int:
    """Examine every file and cache what the training and its held-out sets will read.

    Runs as ``train`` does, on every rank that torchrun starts, so that the cache has the keys that the training asks
    for. Prints what was used and what was left out with its reason. Returns how many items are ready.
    """
    from kinema.data.dataset import open_data
    from kinema.parallel.mesh import start, stop
    from kinema.training.preflight import resolve

    family = open_family(config.model)
    family.validate(config)
    world = start(config.parallel)
    config = resolve(config, world.device)

    def say(text: str) -> None:
        if world.is_main:
            print(text, flush=True)

    try:
        ready = len(open_data(config, config.data.sources, family, world, say))
        for held_out in config.evaluation.sets:
            ready += len(open_data(config, held_out.sources, family, world, say, training=False))
        say(f"{ready} items are ready in {config.data.cache or config.run.dir.parent / 'cache'}")
    finally:
        stop()
    return ready
