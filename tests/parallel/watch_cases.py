"""Two processes of which the second hangs, dies or fails, for each case.

``python watch_cases.py DIRECTORY hangs=PORT ...``.
Children of one process, which has torch ready for all. What each says goes to DIRECTORY/CASE-RANK.txt, exit codes to
DIRECTORY/codes.json. Two processes of one machine need none of the watch's patience, so its seconds are a few.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kinema.config.schema import ParallelConfig
from kinema.errors import UserError
from kinema.parallel import watch
from kinema.parallel.mesh import start
from kinema.parallel.watch import Watch


def hangs() -> None:
    """In its own code, while the other waits for it."""
    time.sleep(600)


def dies() -> None:
    os._exit(1)


def fails() -> None:
    """In its own code, with something to say."""
    raise UserError("the disk of this machine is full")


def run(case: str) -> None:
    world = start(ParallelConfig(), "cpu")
    with Watch(world, 2.0) as watching:
        watching.at("step 1: forward")
        dist.barrier()
        if world.rank == 1:
            {"hangs": hangs, "dies": dies, "fails": fails}[case]()
        watching.at("step 1: update", patient=case != "hangs")
        dist.all_reduce(torch.zeros(1))


def forked(case: str, port: str, rank: int, root: Path) -> int:
    """A child that runs a case; its process number."""
    child = os.fork()
    if child:
        return child
    with (root / f"{case}-{rank}.txt").open("w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    os.environ.update(where | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    try:
        run(case)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(2)
    finally:
        os._exit(0)  # whatever is raised ends here, with a code that no test expects


def main(root: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    watch.INTERVAL, watch.LOST_AFTER, watch.FAILED_AFTER = 0.2, 2.0, 1.0
    children = {}
    for case, _, port in (one.partition("=") for one in cases):
        for rank in (0, 1):
            children[f"{case}-{rank}"] = forked(case, port, rank, root)
    codes = {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for name, child in children.items()}
    (root / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
