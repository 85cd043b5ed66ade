"""What stands in a run directory besides weights and metrics: the resolved configuration and the environment."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kinema
from kinema.config.load import to_toml
from kinema.config.schema import Config

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "av", "numpy", "pillow")


def environment(dataset_fingerprint: str, device: str, world_size: int) -> dict[str, Any]:
    """Versions, commit, data and devices of this process. Nothing from the environment's variables is recorded."""
    import torch

    return {
        "kinema": kinema.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "dataset": dataset_fingerprint,
    }


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform.startswith("linux") and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
