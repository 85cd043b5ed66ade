"""The machine that something is made on: versions, device, threads, and the memory that is left."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kinema

CGROUPS = {
    "": (Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")),
    "memory": (
        Path("/sys/fs/cgroup/memory"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
}
"""Versions 2 and 1 of Linux's control groups: where they lie, and the names that `left_in` takes."""
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "av", "numpy", "pillow")


def describe_machine(device: str) -> dict[str, Any]:
    """Versions, the name of the device, and the number of threads of this process."""
    import torch

    return {
        "kinema": kinema.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform.startswith("linux") and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_left() -> int:
    """Bytes that this process may still take: of the machine's, or less where a control group limits it."""
    import psutil

    own = [left for folder, files in _own_cgroups() if (left := left_in(folder, files)) is not None]
    return max(0, min(psutil.virtual_memory().available, *own))


def left_in(folder: Path, files: tuple[str, str, str]) -> int | None:
    """What a control group leaves, by its files of the limit, of the use, and the line of ``memory.stat`` with what of
    the use the system takes back by itself; None where it sets no limit."""
    limit_name, used_name, spare_name = files
    try:
        limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no limit reads as "max", and the topmost folder has no such files
        return None
    spare = next((int(line.split()[1]) for line in lines if line.startswith(f"{spare_name} ")), 0)
    return limit - used + spare


def _own_cgroups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folder of this process' memory group and those above it, each with the names of its files."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in CGROUPS:
            root, files = CGROUPS[controllers]
            own = root / name.lstrip("/")
            yield from ((folder, files) for folder in (own, *own.parents) if folder.is_relative_to(root))
