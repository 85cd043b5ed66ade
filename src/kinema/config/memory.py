"""What is kept on the devices during a step, and what is computed again or waits in the host's memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from kinema.config.section import Count, Probability, Section, refuse

Checkpointing = (
    Annotated[bool, Strict()]
    | Literal["selective", "nested"]
    | Count
    | Annotated[dict[str, Probability], Field(min_length=1)]
)
"""Which blocks run again in the backward pass, see ``training.activation_checkpointing``."""
OfBlock = bool | Literal["selective", "nested"]
"""What is done with a block, of `Checkpointing`."""
SLOTS = 2
"""Places on the device that the blocks of ``memory.offload_blocks`` share: one computes while the next arrives."""


MEMORY = r"^\d+(\.\d+)? ?[kKMGT]i?B$"
"""An amount of memory, as people write it: 24GB."""


class MemoryConfig(Section):
    budget: str | None = Field(default=None, pattern=MEMORY, examples=["12GB"])
    """The memory of each device that the run may take. What is not given of `training.activation_checkpointing`,
    `training.micro_batch_size`, `offload_activations` and `offload_blocks` is chosen when the run starts: the fastest
    that fits, by the forecast of `kinema plan`. None of it changes more than rounding. With `parallel.auto` the mesh is
    chosen too. Default: no search, or, with `parallel.auto`, what is free."""
    offload_activations: bool = False
    """Keep what blocks save for the backward pass (with `training.activation_checkpointing` their inputs, else all
    large tensors) in pinned host memory, copied while the GPU computes and fetched back ahead of the backward pass."""
    offload_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """How many of the network's blocks have their weights in pinned host memory and travel to the GPU just before they
    compute, forward and backward. `auto`: as few as fit, by the forecast of `kinema plan`."""

    @model_validator(mode="after")
    def _saves_something(self) -> MemoryConfig:
        if self.offload_blocks in range(1, SLOTS + 1):
            raise refuse(
                "offload_blocks",
                f"{self.offload_blocks} saves nothing: the blocks that travel share {SLOTS} places on the GPU. Give "
                f"{SLOTS + 1} or more, or 0",
            )
        return self
