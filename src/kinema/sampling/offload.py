"""What of a model is on the device while it samples, for devices that cannot hold all of it at once.

``parts``: a part (text encoder, network, autoencoder) is there while it works, and goes when another one works.
``blocks``: of a network, a block is there while it works, and the next one is on its way (diffusers' group
offloading); the other parts take turns as before. What is drawn is the same to the bit: the same weights compute on the
same device. Weights stay in the machine's memory; the device gets copies, so that nothing is ever copied back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from kinema.config.section import QUANTIZED
from kinema.errors import UserError
from kinema.machine import memory_left
from kinema.sizes import readable_bytes
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from kinema.families.base import Family

Offload = Literal["none", "parts", "blocks"]
ASKED = ("auto", *get_args(Offload))
ROOM = 0.75
"""Share of a device's free memory that weights may take: the rest is for what they compute."""


# -- choosing --------------------------------------------------------------------------------------------------------


def check_offload(asked: str) -> None:
    """UserError for a word that says no kind of offload."""
    if asked not in ASKED:
        raise UserError(f"--offload {asked}: expected one of {', '.join(ASKED)}{did_you_mean(asked, ASKED)}")


def choose_offload(
    asked: str, family: Family, device: torch.device, dtype: torch.dtype, free: int | None = None
) -> tuple[Offload, str]:
    """The kind of offload, and what is said of it; nothing where it is what anybody expects.

    "auto" decides by the sizes of the parts and what is free on the device (``free`` bytes; default: asked for there):
    none where all weights fit, parts where the largest part does, else blocks.
    """
    if device.type == "cpu":
        said = f"--offload {asked}: on a CPU all parts are in its memory anyway; nothing is moved."
        return "none", said if asked in ("parts", "blocks") else ""
    if asked != "auto":
        return cast("Offload", asked), ""
    if free is None:
        if device.type != "cuda":
            return "none", ""
        import torch

        free, _ = torch.cuda.mem_get_info(device)
    sizes = part_bytes(family, dtype)
    total, largest = sum(sizes.values()), max(sizes.values(), default=0)
    if total <= ROOM * free:
        return "none", ""
    kind: Offload = "parts" if largest <= ROOM * free else "blocks"
    what = "its parts take turns there" if kind == "parts" else "its networks go there block by block"
    return kind, (
        f"{family.variant.name} has {readable_bytes(total)} of weights, and {device} has {readable_bytes(free)} free: "
        f"{what} (--offload {kind}; --offload none keeps all there)."
    )


def part_bytes(family: Family, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weights of each part, as it is loaded to compute in ``dtype``; parts that nobody has counted, in
    families of other packages, are left out."""
    from kinema.families.catalog import entry

    found = {}
    for part in entry(family.name, family.variant.name).parts:
        configured = getattr(family.config, part.name, None)
        stored = None if configured is None else configured.dtype
        if part.parameters:
            size = QUANTIZED.get(stored or "", family.part_dtype(part.name, dtype).itemsize)
            found[part.name] = math.ceil(part.parameters * size)
    return found


@contextmanager
def out_of_memory_advice(device: torch.device) -> Iterator[None]:
    """UserError that says what takes less, where the device's memory does not suffice."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} has too little memory for this ({str(error).splitlines()[0]}) --offload parts and --offload "
            "blocks need less for the networks, --tiling on for the autoencoder; so do fewer --frames, and a smaller "
            "--height and --width. What is written already is kept."
        ) from error


# -- moving ----------------------------------------------------------------------------------------------------------


Parts = tuple["nn.Module", ...]
"""One part, or several that work together."""


class Stage:
    """The device, on which one part is at a time, or several that work together. Making one moves nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: Parts = ()
        self.kept: list[tuple[Tensor, Tensor]] = []
        """The tensors of what is there, and their data in the machine's memory."""

    def bring(self, parts: Parts) -> None:
        """These parts to the device, in the place of those that are there."""
        if self.parts is parts:
            return
        self.clear()
        self.parts = parts
        for part in parts:
            for tensor in (*part.parameters(), *part.buffers()):
                self.kept.append((tensor, tensor.data))
                tensor.data = to_device(tensor.data, self.device)

    def clear(self) -> None:
        """No part on the device."""
        for tensor, data in self.kept:
            tensor.data = data
        moved, self.kept, self.parts = bool(self.kept), [], ()
        if moved and self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


def to_device(data: Tensor, device: torch.device) -> Tensor:
    return data.to(device)


def let_go(device: torch.device) -> None:
    """What nobody holds any more leaves the memory, before other weights come."""
    import gc

    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


@contextmanager
def offloaded(
    pipeline: Any,
    networks: Sequence[str],
    device: torch.device | str,
    kind: Literal["parts", "blocks"],
    together: Sequence[str] = (),
) -> Iterator[None]:
    """The pipeline's parts, which are in the machine's memory, work on ``device`` when they are called; afterwards they
    are as before. By the names of components, ``networks``: those whose blocks take turns with "blocks"; ``together``:
    those that are brought at once, as they would otherwise take turns over and over."""
    import torch
    from torch import nn

    stage = Stage(torch.empty(0, device=device).device)
    kept_there = getattr(pipeline, "_exclude_from_cpu_offload", ())
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    at_once = tuple(part for name, part in modules.items() if name in together)
    undo = []
    try:
        for name, part in modules.items():
            if name in kept_there:
                continue
            if kind == "blocks" and name in networks:
                undo.append(_by_blocks(part, stage))
            else:
                undo.append(_whole(part, at_once if name in together else (part,), stage))
        yield
    finally:
        stage.clear()
        for restore in reversed(undo):
            restore()


def _whole(part: nn.Module, parts: Parts, stage: Stage) -> Callable[[], None]:
    """Bring ``parts`` when this one of them is called. Some pipelines call what is in it: the decoder of an
    autoencoder, the model inside one with a head. Returns what takes the hooks away."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from accelerate.utils import send_to_device

    class Bring(ModelHook):  # type: ignore[misc]
        # pipelines ask a part's hook where it works, and hand it there what it is to work on
        execution_device = stage.device

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            stage.bring(parts)
            return send_to_device(args, stage.device), send_to_device(kwargs, stage.device)

    add_hook_to_module(part, Bring())
    inside = [child.register_forward_pre_hook(lambda *_: stage.bring(parts)) for child in part.children()]

    def restore() -> None:
        for handle in inside:
            handle.remove()
        remove_hook_from_module(part)

    return restore


def _by_blocks(network: nn.Module, stage: Stage) -> Callable[[], None]:
    """The network's blocks on the device while they work, and no other part. Returns what takes the hooks away."""
    from diffusers.hooks import HookRegistry, apply_group_offloading

    on_gpu = stage.device.type == "cuda"
    apply_group_offloading(
        network,
        onload_device=stage.device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
        # pinning all blocks beforehand is faster, and holds them in memory that cannot be swapped out
        low_cpu_mem_usage=on_gpu and not _can_be_pinned(network),
    )
    first = network.register_forward_pre_hook(lambda *_: stage.clear())

    def restore() -> None:
        first.remove()
        for hook in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
            HookRegistry.check_if_exists_or_initialize(network).remove_hook(hook, recurse=True)

    return restore


def _can_be_pinned(network: nn.Module) -> bool:
    """Whether a second copy of the network fits into half of this machine's free memory: while it is pinned, both are
    there."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
    return bool(size <= memory_left() / 2)
