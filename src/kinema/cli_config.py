"""Commands that take a configuration and dotted flags over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kinema.errors import ConfigError

ConfigFile = Annotated[Path, typer.Argument(help="TOML file; `kinema init` writes one.")]

REGENERATE_HELP = "Encode anew what this configuration needs, though the cache has it."


class ConfigCommand(TyperCommand):
    """A command that takes a configuration and, anywhere on its line, dotted flags over it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from kinema.config.load import take_overrides

        ctx.meta["overrides"], rest = take_overrides(args)
        own = [flag for param in self.params for flag in (*param.opts, *param.secondary_opts)]
        for argument in rest:
            name = argument.partition("=")[0]
            if name == "--":
                break
            if name.startswith("--") and name not in (*own, "--help"):
                raise ConfigError(_unknown_flag(name, own))
        return super().parse_args(ctx, rest)


def _unknown_flag(name: str, own: list[str]) -> str:
    from kinema.config.unknown import unknown_key
    from kinema.suggest import nearest

    if near := nearest(name, own, 0.8):
        return f"unknown option {name}; did you mean {near}?"
    return unknown_key((name.removeprefix("--").replace("-", "_"),), is_flag=True)[0]


def load(context: typer.Context, config: Path) -> Any:
    """The configuration of a command, its flags laid over the file."""
    from kinema.config.load import load_config

    return load_config(config, context.meta["overrides"])


def config_command(app: typer.Typer, name: str) -> Callable[[Any], Any]:
    """Register a command that takes a configuration."""
    return app.command(
        name,
        cls=ConfigCommand,
        epilog="Every value of CONFIG can be given here: --optimizer.lr 2e-5 --training.ema.decay 0.99; "
        "`none` unsets an optional one. docs/configuration.md lists them all.",
    )
