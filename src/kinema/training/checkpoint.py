"""Checkpoints: torch's distributed checkpoint, written beside the training and made visible by one rename.

``step-00000120/`` holds ``rank-*.safetensors``, ``index.json`` and ``meta.json``. While it is written it is called
``.writing-step-00000120``: a directory with a checkpoint's name is complete. It loads on any number of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from kinema.errors import UserError
from kinema.parallel.mesh import TIMEOUT, World
from kinema.pinned import pinned
from kinema.runs.checkpoint_files import SafetensorsWriter, disk_error, free_bytes, sync_path
from kinema.runs.checkpoint_list import FORMAT, Checkpoint, list_checkpoints
from kinema.runs.checkpoint_load import State, flatten, load
from kinema.runs.pieces import CopiesPlanner, Pieces
from kinema.sizes import readable_bytes

_WRITING, _DELETING = ".writing-", ".deleting-"


class Checkpointer:
    """Writes, lists and rotates the checkpoints of a run in the directory ``root``.

    ``save`` and ``wait`` are called by all ranks together. What went wrong in a background write is raised, as a
    UserError on every rank, by the next of these calls; the checkpoints before it stay.
    """

    def __init__(self, root: Path, keep: int, asynchronous: bool, world: World) -> None:
        self.root = root
        self.keep = keep
        self.asynchronous = asynchronous
        self.world = world
        self._group = dist.new_group(timeout=TIMEOUT, backend="gloo") if world.size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._copies: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        if world.is_main:
            _prepare_root(root)
        world.barrier()

    def complete(self) -> list[Checkpoint]:
        """All complete checkpoints, the one written last at the end."""
        return list_checkpoints(self.root)

    def latest(self) -> Checkpoint | None:
        """The complete checkpoint written last."""
        return next(reversed(self.complete()), None)

    def save(self, step: int, tensors: State, meta: Mapping[str, Any]) -> None:
        """Write a checkpoint of ``tensors`` (plain, DTensors, `Pieces`) and ``meta`` (into JSON, rank 0's is kept).

        Returns when it is on disk, or, if asynchronous, as soon as it is copied or being copied: then call
        ``wait_for_staging`` before the tensors change. Waits for the write before it.
        """
        self.wait()
        flat = flatten(tensors)
        need = self._check_space(flat)
        described = {
            "format": FORMAT,
            "step": step,
            "ranks": self.world.size,
            "torch": torch.__version__,
            "bytes": need,
        }
        text = json.dumps({**described, "meta": dict(meta)}, indent=1)
        if self.asynchronous:
            copies = self._stage(flat)
            self._pending = self._thread.submit(self._write, step, flat, copies, text, need)
        else:
            self._write(step, flat, None, text, need)

    def wait_for_staging(self) -> None:
        """Return when the tensors that were given to ``save`` may change (on a GPU: by what is queued from now on)."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Return when what was saved is on disk; UserError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """``wait``, and free the copies. The last call."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._copies = {}

    def load(self, path: Path, tensors: State, convert: bool = False) -> dict[str, Any]:
        """Fill ``tensors`` in place from a checkpoint, on all ranks together; returns its ``meta``."""
        return load(path, tensors, self._group, convert)

    def _check_space(self, tensors: Mapping[str, Tensor | Pieces]) -> int:
        """Bytes that will be written; UserError if the file system has less."""
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        if self.world.sizes.pp > 1:  # each stage saves its own
            sizes = {name: size for theirs in self.world.gather_objects(sizes) for name, size in theirs.items()}
        need = sum(sizes.values())
        free = self.world.broadcast_object(free_bytes(self.root) if self.world.is_main else None)
        if need > free:
            raise UserError(self._full(need, f"{readable_bytes(free)} are free"))
        return need

    def _full(self, need: int, reason: str) -> str:
        kept = self.latest()
        return (
            f"cannot write a checkpoint of {readable_bytes(need)} to {self.root}: {reason}. Free some space there, set "
            f"checkpoint.keep lower, or move run.dir to a larger disk, then start the run again: it goes on from "
            f"{kept.path.name if kept else 'its beginning (there is no complete checkpoint yet)'}."
        )

    def _stage(self, tensors: Mapping[str, Tensor | Pieces]) -> dict[str, Tensor]:
        """Copies in CPU memory of this rank's parts; from a GPU they arrive beside its work, in pinned memory."""
        gpu = self.world.device.type == "cuda"
        if gpu:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if gpu else nullcontext(), torch.no_grad():
            copies = {}
            for name, tensor in tensors.items():
                local, copy = local_part(tensor), self._copies.get(name)
                if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                    copy = _memory(local)
                copies[name] = copy.copy_(local, non_blocking=True)
            self._copied = stream.record_event() if gpu else None
        self._copies = copies
        return copies

    def _write(
        self, step: int, tensors: dict[str, Tensor | Pieces], copies: dict[str, Tensor] | None, meta: str, need: int
    ) -> Path:
        """Write, sync, rename and rotate. All ranks succeed, or all raise the same UserError."""
        writing = self.root / f"{_WRITING}step-{step:08d}"
        problem: str | None = None
        path: Path | None = None
        try:
            if self._copied is not None:
                self._copied.synchronize()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is no process group
                dcp.save(
                    tensors,
                    storage_writer=SafetensorsWriter(writing),
                    planner=CopiesPlanner(copies),
                    process_group=self._group,
                    no_dist=self.world.size == 1,
                )
            if self.world.is_main:
                path = self._publish(writing, step, meta)
        except (Exception, CheckpointException) as error:
            reason = disk_error(error)
            if reason is None:
                raise
            problem = self._full(need, reason)
            if self.world.is_main:
                shutil.rmtree(writing, ignore_errors=True)
        path, problem = self._agree((path, problem))
        if problem is not None or path is None:
            raise UserError(problem or f"checkpoint {writing} was not written")
        if self.world.is_main:
            self._rotate()
        return path

    def _agree(self, outcome: tuple[Path | None, str | None]) -> tuple[Path | None, str | None]:
        """Rank 0's outcome: a failure of any rank fails all of them within dcp.save, what follows is rank 0's."""
        if self._group is None:
            return outcome
        values = [outcome]
        dist.broadcast_object_list(values, src=0, group=self._group, device=torch.device("cpu"))
        return values[0]

    def _publish(self, writing: Path, step: int, meta: str) -> Path:
        """Make a written directory visible under its name."""
        existing = self.complete()
        record = {"sequence": existing[-1].sequence + 1 if existing else 0, **json.loads(meta)}
        (writing / "meta.json").write_text(json.dumps(record, indent=1))
        sync_path(writing / "meta.json")
        sync_path(writing)
        again = sum(checkpoint.step == step for checkpoint in existing)  # the run was taken back and came here again
        path = self.root / (f"step-{step:08d}" + (f"-{again}" if again else ""))
        while path.exists():
            again += 1
            path = self.root / f"step-{step:08d}-{again}"
        os.rename(writing, path)
        sync_path(self.root)
        return path

    def _rotate(self) -> None:
        for old in self.complete()[: -self.keep]:
            _delete(old.path)


def _prepare_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the checkpoint directory {root}: {error.strerror}. Check run.dir.") from error
    for path in root.iterdir():
        if path.name.startswith((_WRITING, _DELETING)):
            shutil.rmtree(path, ignore_errors=True)


def _delete(path: Path) -> None:
    """Delete a checkpoint such that no part of it is ever taken for a whole one."""
    gone = path.with_name(_DELETING + path.name)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def local_part(tensor: Tensor | Pieces) -> Tensor:
    """What this rank holds of a tensor, by reference."""
    if isinstance(tensor, Pieces):
        return tensor.local
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _memory(tensor: Tensor) -> Tensor:
    """Memory of the host for a copy of a tensor."""
    if tensor.is_cuda:
        return pinned(tuple(tensor.shape), tensor.dtype, "checkpoint.asynchronous")
    return torch.empty(tensor.shape, dtype=tensor.dtype)
