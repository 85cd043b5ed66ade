"""How a network computes while it samples: whose attention, and whether queries, keys and values are one product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from kinema.config.section import QUANTIZED
from kinema.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from kinema.config.schema import SamplingAttention, SequenceAttention
    from kinema.families.base import Family, Parts


@dataclass(frozen=True)
class Kernels:
    """What ``--attention-backend`` and ``--fuse-qkv`` say."""

    attention: str = "sdpa"
    fuse: bool = False

    def check(self, family: Family, device: torch.device, dtype: torch.dtype, among: SequenceAttention | None) -> None:
        """UserError if they cannot be had; ``among``: how processes that draw together attend to each other's tokens,
        None where there is one. Loads packages of kernels, and no weights."""
        from kinema.memory.attention import check_attention
        from kinema.memory.fusion import check_fusion

        check_attention(self.attention, "--attention-backend", device, dtype, trains=False)
        if self.attention != "sdpa" and among == "ring":
            raise ConfigError(
                f"--attention-backend {self.attention}: not with --sp-attention ring, which merges what torch's own "
                "kernels find in each piece. Give --sp-attention ulysses."
            )
        if self.fuse:
            networks = [part for part in family.variant.parts if part.startswith("network")]
            for part in networks:
                stored = getattr(family.config, part).dtype
                if stored in QUANTIZED:
                    raise ConfigError(
                        f'--fuse-qkv: not with model.{part}.dtype = "{stored}", whose layers are rounded one by one. '
                        "Leave one of the two out."
                    )
            check_fusion(family, "--fuse-qkv", networks)

    def install(self, family: Family, parts: Parts) -> None:
        """Let the networks among these parts compute so, in place. Call it after `Together.split`."""
        from kinema.memory.attention import attend_with
        from kinema.memory.fusion import fuse_projections

        for name, part in parts.items():
            if name.startswith("network"):
                if self.fuse:
                    fuse_projections(part)
                if self.attention != "sdpa":  # families of other packages may not name their blocks
                    attend_with(family.blocks(part), cast("SamplingAttention", self.attention))

    @property
    def facts(self) -> dict[str, Any]:
        """What a file says of them; nothing where they are torch's own."""
        said = {} if self.attention == "sdpa" else {"attention": self.attention}
        return said | ({"fuse_qkv": True} if self.fuse else {})
