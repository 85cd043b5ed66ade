"""Forecasts of what ``[memory]``, short bases, kinds of checkpointing and optimisers take, against real steps: bytes of
tensors alive on a CPU, those that would be in a GPU's host counted apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from elsewhere import PIECE_BYTES
from plan_cases import Small, configured, expected, measured, write

from kinema.data.buckets import Bucket
from kinema.optim import adam, host_state
from kinema.parallel.mesh import Sizes, World

TOLERANCE = 0.1
DEEP = (
    Small("wan", "t2v-1.3b", {"num_attention_heads": 16, "ffn_dim": 768, "num_layers": 24}, Bucket(9, 96, 96)),
    Small("flux", "dev", {"num_attention_heads": 10, "num_layers": 8, "num_single_layers": 16}, Bucket(1, 160, 160)),
    Small(
        "hunyuan_video",
        "t2v",
        {"num_attention_heads": 12, "num_layers": 8, "num_single_layers": 16},
        Bucket(9, 96, 96),
    ),
)
"""Networks of many small blocks, so that those that travel weigh more than the two places that they share."""

LORA: dict[str, Any] = {"adapter": {"rank": 4}}
AGAIN: dict[str, Any] = {"activation_checkpointing": True}
KINDS: dict[str, dict[str, Any]] = {
    "lora, no blocks away": LORA | {"training": AGAIN},
    "lora, blocks": LORA | {"training": AGAIN, "memory": {"offload_blocks": 16}},
    "lora, all blocks": LORA | {"training": AGAIN, "memory": {"offload_blocks": 24}},
    "lora, activations": LORA | {"memory": {"offload_activations": True}},
    "lora, checkpointed, activations": LORA | {"training": AGAIN, "memory": {"offload_activations": True}},
    "lora, blocks, activations": LORA
    | {"training": AGAIN, "memory": {"offload_activations": True, "offload_blocks": 24}},
    "full, blocks": {"training": AGAIN | {"ema": {"decay": 0.99}}, "memory": {"offload_blocks": 16}},
    "full, all blocks, accumulated": {
        "training": AGAIN | {"batch_size": 4, "micro_batch_size": 2},
        "memory": {"offload_blocks": 24},
    },
    "full, activations": {"memory": {"offload_activations": True}},
    "full, checkpointed, activations": {"training": AGAIN, "memory": {"offload_activations": True}},
    "fp8": LORA | {"training": AGAIN, "model": {"network": {"dtype": "fp8"}}},
    "int8": LORA | {"training": AGAIN, "model": {"network": {"dtype": "int8"}}},
    "nf4": LORA | {"training": AGAIN, "model": {"network": {"dtype": "nf4"}}},
    "fp8, plain": LORA | {"model": {"network": {"dtype": "fp8"}}},
    "nf4, blocks": LORA
    | {"training": AGAIN, "model": {"network": {"dtype": "nf4"}}, "memory": {"offload_blocks": 24}},
    "full, selective": {"training": {"activation_checkpointing": "selective"}},
    "lora, selective": LORA | {"training": {"activation_checkpointing": "selective"}},
    "full, nested": {"training": {"activation_checkpointing": "nested"}},
    "full, every 2nd": {"training": {"activation_checkpointing": 2}},
    "lora, every 3rd": LORA | {"training": {"activation_checkpointing": 3}},
    "full, adamw8bit": {"training": AGAIN, "optimizer": {"type": "adamw8bit"}},
    "full, state on the host": {"training": AGAIN, "optimizer": {"state_on_cpu": True}},
    "full, released, adamw8bit": {
        "training": AGAIN | {"clip_norm": None},
        "optimizer": {"type": "adamw8bit", "gradient_release": True},
    },
    "full, released, state on the host": {
        "training": AGAIN | {"clip_norm": None},
        "optimizer": {"state_on_cpu": True, "gradient_release": True},
    },
}
"""Tables of configurations."""
