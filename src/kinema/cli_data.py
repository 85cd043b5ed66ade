"""``kinema data`` and ``kinema cache``: look at what a configuration will train on, and prepare it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kinema.cli_config import REGENERATE_HELP, ConfigFile, config_command, load
from kinema.errors import UserError

data_app = typer.Typer(no_args_is_help=True, help="Look at what a configuration will train on.", rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print everything as one JSON object and nothing else.")]


@config_command(data_app, "inspect")
def inspect(
    context: typer.Context,
    config: ConfigFile,
    as_json: Json = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes. Default: data.html in the run directory.")
    ] = None,
) -> None:
    """Print what CONFIG will train on and write a page about it: counts, buckets, every record that is left out and
    why, duplicates, captions, thumbnails with their crop, steps per epoch. Nothing is encoded."""
    loaded, sets = _inspect(context, config, quiet=as_json)
    if as_json:
        first, *held_out = (one.to_json() for one in sets)
        print(json.dumps({**first, "evaluation": held_out}, indent=2))
        return
    from kinema.ui.data_page import write_data_page
    from kinema.ui.data_text import print_inspection

    for one in sets:
        print_inspection(one)
    page = write_data_page(sets, html or loaded.run.dir / "data.html", config.stem)
    print(f"Open {page.resolve()}")


@config_command(data_app, "check")
def check(
    context: typer.Context,
    config: ConfigFile,
    as_json: Json = False,
    max_left_out: Annotated[int, typer.Option(metavar="N", help="So many records may be left out.")] = 0,
) -> None:
    """Check the data of CONFIG, for scripts: exit code 0 if every record can be used, 1 if more than N are left out or
    a set has none, 2 for a mistake in CONFIG. Prints every record that is left out."""
    loaded, sets = _inspect(context, config, quiet=as_json)
    bad = [one for one in sets if len(one.left_out) > max_left_out or not one.used]
    if as_json:
        rows = [{"set": one.name, "ok": one not in bad, **_brief(one.to_json())} for one in sets]
        print(json.dumps({"ok": not bad, "sets": rows}, indent=2))
    else:
        for one in sets:
            for entry in one.left_out:
                print(entry)
            verdict = "not usable" if one in bad else "ok"
            print(f"{one.name}: {one.used} of {one.records} records used, {len(one.left_out)} left out: {verdict}")
        if loaded.data.examine == "trust":
            print("What tables say was believed, with data.examine = trust; --data.examine clips opens every file")
    raise typer.Exit(1 if bad else 0)


def _brief(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("records", "used", "left_out")}


def _inspect(context: typer.Context, path: Path, quiet: bool) -> tuple[Any, list[Any]]:
    """The configuration, and what is found in its training set and in its held-out sets."""
    config = load(context, path)
    from kinema.training.inspection import inspect_sets

    return config, inspect_sets(config, say=_silent if quiet else _say)


def _silent(text: str) -> None:
    pass


def _say(text: str) -> None:
    print(text, flush=True)


def cache(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="TOML file.")] = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="Say how much there is to encode, and stop.")] = False,
    regenerate: Annotated[bool, typer.Option("--regenerate", help=REGENERATE_HELP)] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Print the cache's sizes by encoding; encode nothing.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Delete what CONFIG does not need.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --prune: say what would go.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --prune: although another process writes to the cache.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of the cache, list what is damaged, exit with 1 if anything is.")
    ] = False,
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="With --verify: the cache, instead of CONFIG.")
    ] = None,
) -> None:
    """Prepare and cache the data of CONFIG.

    Examines every file, lists what cannot be used and why, and caches latents and text. Trains nothing.
    """
    asked = {"--forecast": forecast, "--regenerate": regenerate, "--report": report, "--prune": prune}
    asked["--verify"] = verify
    _check_cache_options([name for name, on in asked.items() if on], config, dry_run, force, directory)
    loaded: Any = None if config is None else load(context, config)
    from kinema.training import prepare

    if verify:
        if not prepare.verify_cache(directory or prepare.cache_directory(loaded)):
            raise typer.Exit(1)
    elif report:
        prepare.report_cache(loaded)
    elif prune:
        prepare.prune_cache(loaded, dry_run=dry_run, force=force)
    else:
        prepare.prepare_data(loaded, regenerate=regenerate, forecast=forecast)


def _check_cache_options(asked: list[str], config: Path | None, dry_run: bool, force: bool, directory: Any) -> None:
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: give one at a time")
    if (dry_run or force) and asked != ["--prune"]:
        raise UserError(f"{'--dry-run' if dry_run else '--force'} is read with --prune alone")
    if directory is not None and asked != ["--verify"]:
        raise UserError("--dir is read with --verify alone; elsewhere data.cache says where the cache is")
    if config is None and directory is None:
        raise UserError("give CONFIG, the TOML file whose data this is about (or --verify --dir DIR)")
    if config is not None and directory is not None:
        raise UserError("CONFIG and --dir both say where the cache is: give one of them")
