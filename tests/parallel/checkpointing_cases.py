"""Trainings of `pipeline_cases` that note how many blocks run again. Those that are compiled go through dynamo and AOT
autograd alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pipeline_cases import Plan, Result, train
from ranks import run_cases
from torch import nn

from kinema.config.memory import Checkpointing
from kinema.memory import checkpointing
from kinema.memory import compile as compilation
from kinema.parallel.mesh import World

_again: list[int] = []


def _noting(checkpoint: Callable[..., None], blocks: Mapping[str, nn.ModuleList], kind: Checkpointing = True) -> None:
    checkpoint(blocks, kind)
    forwards = [block.forward.__name__ for group in blocks.values() for block in group]
    _again.append(forwards.count("checkpointed_forward"))


PATCHES: list[tuple[Any, str, Callable[..., None]]] = [
    (compilation, "compile_blocks", partial(compilation.compile_blocks, backend="aot_eager")),
    (checkpointing, "checkpoint_blocks", partial(_noting, checkpointing.checkpoint_blocks)),
]


def run(world: World, name: str, root: Path) -> Result:
    torch._dynamo.reset()
    result = train(world, Plan.of(name), root)
    return result | {"again": world.gather_objects(_again.pop())}


def main(root: Path, cases: list[str]) -> None:
    for patch in PATCHES:
        setattr(*patch)
    run_cases(root, cases, lambda name, _: Plan.of(name).mesh(), run)
