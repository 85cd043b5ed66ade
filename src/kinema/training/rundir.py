"""What stands in a run directory besides weights and metrics: the resolved configuration and the environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import kinema
from kinema.config.load import to_toml
from kinema.config.schema import Config
from kinema.machine import describe_machine


def environment(dataset_fingerprint: str, device: str, world_size: int) -> dict[str, Any]:
    """Versions, commit, data and devices of this process. Nothing from the environment's variables is recorded."""
    own = {"git_commit": _git_commit(), "processes": world_size, "dataset": dataset_fingerprint}
    return describe_machine(device) | own


def write_description(directory: Path, config: Config, facts: dict[str, Any]) -> None:
    """``config.toml`` (every key, defaults included) and ``environment.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("config.toml", to_toml(config)),
        ("environment.json", json.dumps(facts, indent=2) + "\n"),
    ):
        partial = directory / (name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(directory / name)


def _git_commit() -> str | None:
    """The commit of kinema's own checkout, with ``+`` if it was changed; None when installed from a wheel."""
    root = Path(kinema.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], check=False, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
