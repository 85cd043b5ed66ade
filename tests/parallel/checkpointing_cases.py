"""Trainings of `pipeline_cases` whose blocks, where they are compiled, go through dynamo and AOT autograd alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from pipeline_cases import Plan, Result, train
from ranks import run_cases

from kinema.memory import compile as compilation
from kinema.parallel.mesh import World

compile_blocks = partial(compilation.compile_blocks, backend="aot_eager")


def run(world: World, name: str, root: Path) -> Result:
    torch._dynamo.reset()
    return train(world, Plan.of(name), root)


def main(root: Path, cases: list[str]) -> None:
    compilation.compile_blocks = compile_blocks
    run_cases(root, cases, lambda name, _: Plan.of(name).mesh(), run)
