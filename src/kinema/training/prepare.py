"""The cache of a configuration, apart from training: ``kinema cache`` fills, measures, prunes and verifies it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.schema import Config, SourceConfig
from kinema.families.registry import open_family
from kinema.sizes import readable_bytes

if TYPE_CHECKING:
    from kinema.data.cache_tools import Freed
    from kinema.families.base import Family
    from kinema.parallel.mesh import World

Say = Callable[[str], None]


def cache_directory(config: Config) -> Path:
    """Where the cache of a configuration is."""
    return config.data.cache or config.run.dir.parent / "cache"


def prepare_data(config: Config, *, regenerate: bool = False, forecast: bool = False) -> int:
    """Examine every file and cache what the training and its held-out sets will read.

    Runs as ``train`` does, on every rank that torchrun starts, so that the cache has the keys that the training asks
    for. Prints what was used and what was left out with its reason. ``regenerate``: what the cache has is encoded anew.
    ``forecast``: say how much there is to encode, and encode nothing. Returns how many items are ready.
    """
    from kinema.data.opening import open_data

    with _opened(config) as (settled, family, world, say):
        ready = 0
        for sources, training in _sets(settled):
            data = open_data(
                settled, sources, family, world, say,
                training=training, regenerate=regenerate, forecast_only=forecast,
            )  # fmt: skip
            ready += len(data)
        if not forecast:
            online = " and ".join(config.data.online)
            later = f"; the {online} of the training set is encoded on line" if online else ""
            say(f"{ready} items are ready in {cache_directory(settled)}{later}")
    return ready


def report_cache(config: Config) -> None:
    """Print what the cache holds of what a configuration needs, by encoding, and what it holds besides."""
    from kinema.data.cache import Cache
    from kinema.data.cache_tools import REST, size_report

    with _opened(config) as (settled, family, world, say):
        planned = _planned(settled, family, world, say)
        if world.is_main:
            rows = size_report(Cache(cache_directory(settled)), planned)
            unused, _, unused_bytes = rows.pop(REST)
            say(f"The cache {cache_directory(settled)} holds")
            width = max((len(name) for name in rows), default=0)
            for name, (wanted, there, size) in rows.items():
                say(f"  {name:{width}}  {there} of {wanted} entries, {readable_bytes(size)}")
            hint = ", which --prune frees" if unused else ""
            say(f"  {REST}: {unused} entries, {readable_bytes(unused_bytes)}{hint}")
        else:
            for _ in planned:
                pass


def prune_cache(config: Config, *, dry_run: bool = False, force: bool = False) -> Freed | None:
    """Take out of the cache what a configuration does not need. See `kinema.data.cache_tools.prune`."""
    from kinema.data.cache import Cache
    from kinema.data.cache_tools import prune
    from kinema.data.facts import FactStore

    freed = None
    with _opened(config) as (settled, family, world, say):
        keys = (key for _, key in _planned(settled, family, world, say))
        if world.is_main:
            freed = prune(Cache(cache_directory(settled)), keys, force=force, dry_run=dry_run)
            would = "would be" if dry_run else "were"
            say(
                f"{freed.entries} entries ({readable_bytes(freed.bytes)}) {would} taken out of "
                f"{cache_directory(settled)}: {freed.deleted} files deleted, {freed.rewritten} written anew; "
                f"{freed.kept - freed.damaged} entries stay"
            )
            if freed.damaged:
                say(f"{freed.damaged} entries were damaged and are gone too: they are encoded anew when needed")
            if not dry_run and (fewer := FactStore(cache_directory(settled)).compact()):
                say(f"What was found out about files lay in {fewer + 1} files, and lies in one now")
        else:
            for _ in keys:
                pass
    return freed


def verify_cache(directory: Path) -> bool:
    """Print what of a cache is intact and what is not; whether all of it is."""
    from kinema.data.cache_tools import verify

    report = verify(directory)
    print("\n".join(report.lines()), flush=True)
    return not report.damaged


@contextmanager
def _opened(config: Config) -> Iterator[tuple[Config, Family, World, Say]]:
    """What reading the data of a configuration takes: (settled configuration, family, processes, where to print)."""
    from kinema.parallel.mesh import start, stop
    from kinema.training.preflight import resolve

    family = open_family(config.model)
    family.validate(config)
    world = start(config.parallel)

    def say(text: str) -> None:
        if world.is_main:
            print(text, flush=True)

    yield resolve(config, world.device), family, world, say
    stop()


def _sets(config: Config) -> list[tuple[Sequence[SourceConfig], bool]]:
    """(sources, whether they are trained on) of the training and of each held-out set."""
    return [(config.data.sources, True), *((one.sources, False) for one in config.evaluation.sets)]


def _planned(config: Config, family: Family, world: World, say: Say) -> Iterator[tuple[str, bytes]]:
    """(encoding, key) of everything that a configuration needs. Every rank runs through it."""
    from kinema.data.opening import planned_keys

    for sources, training in _sets(config):
        yield from planned_keys(config, sources, family, world, say, training=training)
