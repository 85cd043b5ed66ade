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
    Small("wan", "t2v-1.3b", {"num_attention_heads": 10, "ffn_dim": 480, "num_layers": 16}, Bucket(5, 80, 80)),
    Small("flux", "dev", {"num_attention_heads": 8, "num_layers": 6, "num_single_layers": 10}, Bucket(1, 112, 112)),
    Small(
        "hunyuan_video",
        "t2v",
        {"num_attention_heads": 8, "num_layers": 6, "num_single_layers": 10},
        Bucket(5, 64, 64),
    ),
)
"""Networks of many small blocks, so that those that travel weigh more than the two places that they share."""

LORA: dict[str, Any] = {"adapter": {"rank": 4}}
SHARE = {name: 0.5 for name in ("blocks", "transformer_blocks", "single_transformer_blocks")}
AGAIN: dict[str, Any] = {"activation_checkpointing": True}
KINDS: dict[str, dict[str, Any]] = {
    "lora, no blocks away": LORA | {"training": AGAIN},
    "lora, blocks": LORA | {"training": AGAIN, "memory": {"offload_blocks": 10}},
    "lora, all blocks": LORA | {"training": AGAIN, "memory": {"offload_blocks": 16}},
    "lora, activations": LORA | {"memory": {"offload_activations": True}},
    "lora, checkpointed, activations": LORA | {"training": AGAIN, "memory": {"offload_activations": True}},
    "lora, blocks, activations": LORA
    | {"training": AGAIN, "memory": {"offload_activations": True, "offload_blocks": 16}},
    "full, blocks": {"training": AGAIN | {"ema": {"decay": 0.99}}, "memory": {"offload_blocks": 10}},
    "full, all blocks, accumulated": {
        "training": AGAIN | {"batch_size": 4, "micro_batch_size": 2},
        "memory": {"offload_blocks": 16},
    },
    "full, activations": {"memory": {"offload_activations": True}},
    "full, released, activations": {
        "training": {"clip_norm": None},
        "optimizer": {"type": "adamw8bit", "gradient_release": True},
        "memory": {"offload_activations": True},
    },
    "fp8": LORA | {"training": AGAIN, "model": {"network": {"dtype": "fp8"}}},
    "int8": LORA | {"training": AGAIN, "model": {"network": {"dtype": "int8"}}},
    "nf4": LORA | {"training": AGAIN, "model": {"network": {"dtype": "nf4"}}},
    "fp8, plain": LORA | {"model": {"network": {"dtype": "fp8"}}},
    "nf4, blocks": LORA | {"training": AGAIN, "model": {"network": {"dtype": "nf4"}}, "memory": {"offload_blocks": 16}},
    "full, selective": {"training": {"activation_checkpointing": "selective"}},
    "lora, selective": LORA | {"training": {"activation_checkpointing": "selective"}},
    "full, nested": {"training": {"activation_checkpointing": "nested"}},
    "full, every 2nd": {"training": {"activation_checkpointing": 2}},
    "lora, every 2nd": LORA | {"training": {"activation_checkpointing": 2}},
    "lora, nested": LORA | {"training": {"activation_checkpointing": "nested"}},
    "lora, a share": LORA | {"training": {"activation_checkpointing": SHARE}},
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


def tables_of(kind: str) -> dict[str, Any]:
    """The tables of a kind; one sample at once where it does not say how many."""
    tables = KINDS[kind]
    return tables | {"training": {"batch_size": 1} | tables.get("training", {})}


QUICK = {
    ("wan-t2v-1.3b", "full, blocks"),
    ("wan-t2v-1.3b", "lora, blocks, activations"),
    ("flux-dev", "nf4"),
    ("hunyuan_video-t2v", "full, state on the host"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.mark.parametrize(
    ("small", "kind"),
    [
        pytest.param(small, kind, id=f"{small.id}-{kind}", marks=[] if (small.id, kind) in QUICK else pytest.mark.slow)
        for small in DEEP
        for kind in KINDS
    ],
)
def test_memory_of_a_device_and_of_its_host(
    small: Small, kind: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(host_state, "PART_BYTES", PIECE_BYTES)
    config = configured(small, write(small, root), tables_of(kind))
    counted = measured(config, small.bucket, World.alone())
    memory, _ = expected(config, small.bucket, Sizes())
    assert memory.total == pytest.approx(counted.peak, rel=TOLERANCE)
    assert memory.host == pytest.approx(counted.host, rel=TOLERANCE)
