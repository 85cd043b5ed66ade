"""`pipeline_cases` with more samples, counting what replicas of shards add up: the bytes of all-reduces of gradients in
each case, in ``reduced.json`` beside the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pipeline_cases
import torch
import torch.distributed as dist
from pipeline_cases import Plan, train

from kinema.config.schema import ParallelConfig
from kinema.parallel.mesh import lay_out, start, stop

SAMPLES = 8


def main(root: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    pipeline_cases.SAMPLES = SAMPLES
    started = start(ParallelConfig(), "cpu")
    reduced: dict[str, int] = {}
    inner = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced[name] += tensor.nbytes if tensor.numel() > 64 else 0
        return inner(tensor, *args, **kwargs)

    dist.all_reduce = counting
    for name in names:
        reduced[name] = 0
        result = train(lay_out(started, Plan.of(name).mesh()), Plan.of(name), root)
        if started.is_main:
            torch.save(result, root / f"{name}.result")
    if started.is_main:
        (root / "reduced.json").write_text(json.dumps(reduced))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
