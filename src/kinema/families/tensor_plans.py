"""How tensor parallel shares each network's matrices: facts by the class of the network, which diffusers names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kinema.families.class_facts import of_class

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["column", "row", "gathered", "norm", "head_norm"]


@dataclass(frozen=True)
class Split:
    """What a peer has of a layer.

    ``column``: some output channels of a linear layer, whose input all have. ``row``: the input channels that meet
    them. ``gathered``: some output channels, which are then put together. ``norm``: some channels of a norm over all
    heads. ``head_norm``: all of a norm within each head, which sees the heads that are here.
    """

    kind: Kind
    blocks: Callable[[int, int], tuple[int, ...]] | None = None
    """Of input and output channels, the sizes of the parts that are shared each by itself; None: it is one."""

    def sizes(self, layer: Any) -> tuple[int, ...]:
        """Of the dimension that is shared; () where none is."""
        if self.kind == "head_norm":
            return ()
        layer = getattr(layer, "base_layer", layer)
        if self.kind == "norm":
            return (layer.weight.numel(),)
        if self.blocks is not None:
            return self.blocks(layer.in_features, layer.out_features)
        return (layer.in_features if self.kind == "row" else layer.out_features,)


@dataclass(frozen=True)
class TensorPlan:
    """How the layers of one network are shared. Layers that are not named are whole on every peer."""

    layers: Mapping[str, Split]
    """By names of modules, in which ``*`` stands for one of a list. Some variants lack some of them."""
    heads: tuple[str, ...] = ("num_attention_heads",)
    """Keys of the network's configuration that count heads, of which every peer has whole ones."""
    counters: tuple[str, ...] = ()
    """Modules whose attribute ``heads`` says how many heads they see."""
    narrowed: Mapping[str, str] = field(default_factory=dict)
    """Of modules, an argument with the channels of all heads in its last dimension (a tensor or a tuple of them), of
    which they take those of the heads that they see."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that the layers are in."""
        return tuple(dict.fromkeys(name[: name.index("*") + 1] for name in self.layers))

    def head_counts(self, network: nn.Module) -> dict[str, int]:
        """How many heads there are, by the keys of the configuration."""
        config: Any = network.config
        return {key: config[key] for key in self.heads}


def tensor_plan(network: nn.Module) -> TensorPlan | None:
    """How a network's matrices are shared; None if nothing says so."""
    return of_class(network, PLANS)


REFUSED: Mapping[str, str] = {
    "sdxl": "its network is made of convolutions, which have few heads of attention to share",
}
"""Families without tensor parallel, and why."""


def _thirds(inputs: int, outputs: int) -> tuple[int, ...]:
    """Queries, keys and values in one layer."""
    return (outputs // 3,) * 3


def _from_attention(inputs: int, outputs: int) -> tuple[int, ...]:
    """Input channels: the output of attention, as wide as what is made of it, then that of the feed-forward part."""
    return outputs, inputs - outputs


def _value_and_inner(inputs: int, outputs: int) -> tuple[int, ...]:
    """Output channels: values, as wide as the input, then the feed-forward part's."""
    return inputs, outputs - inputs


def _queries_to_inner(inputs: int, outputs: int) -> tuple[int, ...]:
    """Output channels: queries, keys and values, then the feed-forward part's."""
    return inputs, inputs, inputs, outputs - 3 * inputs


COLUMN, ROW, GATHERED = Split("column"), Split("row"), Split("gathered")
NORM, HEAD_NORM = Split("norm"), Split("head_norm")


def _under(prefix: str, layers: Mapping[str, Split]) -> dict[str, Split]:
    return {f"{prefix}.{name}": split for name, split in layers.items()}


_ATTENTION = {"to_q": COLUMN, "to_k": COLUMN, "to_v": COLUMN, "to_out.0": ROW}
_ADDED = {"add_q_proj": COLUMN, "add_k_proj": COLUMN, "add_v_proj": COLUMN, "to_add_out": ROW}
_HEAD_NORMS = {f"norm_{name}": HEAD_NORM for name in ("q", "k", "added_q", "added_k")}
_JOINT = _ATTENTION | _ADDED | _HEAD_NORMS
"""diffusers' attention of two streams."""
_FEED_FORWARD = {"net.0.proj": COLUMN, "net.2": ROW}
"""diffusers' feed-forward part without a gate."""

_FLUX_DOUBLE = {
    **_under("attn", _JOINT),
    **_under("ff", _FEED_FORWARD),
    **_under("ff_context", _FEED_FORWARD),
    "norm1.linear": GATHERED,
    "norm1_context.linear": GATHERED,
}
_FLUX_SINGLE = {
    **_under("attn", _ATTENTION | _HEAD_NORMS),
    "proj_mlp": COLUMN,
    "proj_out": Split("row", _from_attention),
    "norm.linear": GATHERED,
}
_FLUX = _under("transformer_blocks.*", _FLUX_DOUBLE) | _under("single_transformer_blocks.*", _FLUX_SINGLE)

_OPEN_SORA_ATTENTION = {
    "qkv": Split("column", _thirds),
    "q_proj": COLUMN,
    "k_proj": COLUMN,
    "v_proj": COLUMN,
    "norm.query_norm": HEAD_NORM,
    "norm.key_norm": HEAD_NORM,
    "proj": ROW,
}
_OPEN_SORA_STREAM = {
    **_under("attn", _OPEN_SORA_ATTENTION),
    "mlp.0": COLUMN,
    "mlp.2": ROW,
    "mod.lin": GATHERED,
}
_OPEN_SORA = {
    **{f"double_blocks.*.{stream}_{name}": s for stream in ("img", "txt") for name, s in _OPEN_SORA_STREAM.items()},
    **_under(
        "single_blocks.*",
        {
            "q_proj": COLUMN,
            "k_proj": COLUMN,
            "v_mlp": Split("column", _value_and_inner),
            "linear1": Split("column", _queries_to_inner),
            "linear2": Split("row", _from_attention),
            "norm.query_norm": HEAD_NORM,
            "norm.key_norm": HEAD_NORM,
            "modulation.lin": GATHERED,
        },
    ),
}

_QWEN_IMAGE = {
    **_under("attn", _JOINT),
    **_under("img_mlp", _FEED_FORWARD),
    **_under("txt_mlp", _FEED_FORWARD),
    "img_mod.1": GATHERED,
    "txt_mod.1": GATHERED,
}

_SD3 = {
    **_FLUX_DOUBLE,
    **_under("attn2", _ATTENTION | _HEAD_NORMS),
}
_AURA_FLOW_FEED_FORWARD = {"linear_1": COLUMN, "linear_2": COLUMN, "out_projection": ROW}
_AURA_FLOW = {
    **_under("attn", _JOINT),
    **_under("ff", _AURA_FLOW_FEED_FORWARD),
    **_under("ff_context", _AURA_FLOW_FEED_FORWARD),
    "norm1.linear": GATHERED,
    "norm1_context.linear": GATHERED,
}
_LUMINA = {
    **_under("attn", _ATTENTION | _HEAD_NORMS),
    **_under("feed_forward", {"linear_1": COLUMN, "linear_3": COLUMN, "linear_2": ROW}),
    "norm1.linear": GATHERED,
}
_GATED = {"w1": COLUMN, "w3": COLUMN, "w2": ROW}
_Z_IMAGE = {
    **_under("attention", _ATTENTION | _HEAD_NORMS),
    **_under("feed_forward", _GATED),
    "adaLN_modulation.0": GATHERED,
}
_COSMOS = {
    **_under("attn1", _ATTENTION | _HEAD_NORMS),
    **_under("attn2", _ATTENTION | _HEAD_NORMS),
    **_under("ff", _FEED_FORWARD),
}
_HIDREAM = {
    **{f"attn1.to_{name}{stream}": COLUMN for name in ("q", "k", "v") for stream in ("", "_t")},
    **{f"attn1.to_out{stream}": ROW for stream in ("", "_t")},
    **{f"attn1.{name}_rms_norm{stream}": NORM for name in ("q", "k") for stream in ("", "_t")},
    **_under("ff_i.shared_experts", _GATED),
    **_under("ff_i.experts.*", _GATED),
    **_under("ff_t", _GATED),
    "adaLN_modulation.1": GATHERED,
}

_NORMS_OF_ALL = {"norm_q": NORM, "norm_k": NORM}
_LTX = {
    **_under("attn1", _ATTENTION | _NORMS_OF_ALL),
    **_under("attn2", _ATTENTION | _NORMS_OF_ALL),
    **_under("ff", _FEED_FORWARD),
}
_WAN = {
    **_under("attn1", _ATTENTION | _NORMS_OF_ALL),
    **_under("attn2", _ATTENTION | _NORMS_OF_ALL),
    **_under("attn2", {"add_k_proj": COLUMN, "add_v_proj": COLUMN, "norm_added_k": NORM}),
    **_under("ffn", _FEED_FORWARD),
}

_BOTH_ATTENTIONS = ("transformer_blocks.*.attn1", "transformer_blocks.*.attn2")
_OF_FLUX = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
_REFINED = ("noise_refiner.*", "context_refiner.*", "ref_image_refiner.*", "layers.*")
_GROUPED = ("num_attention_heads", "num_kv_heads")


def _in_all(lists: tuple[str, ...], layers: Mapping[str, Split]) -> dict[str, Split]:
    return {name: split for prefix in lists for name, split in _under(prefix, layers).items()}


PLANS: Mapping[str, TensorPlan] = {
    "AuraFlowTransformer2DModel": TensorPlan(
        _in_all(("joint_transformer_blocks.*", "single_transformer_blocks.*"), _AURA_FLOW),
        counters=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    ),
    "ChromaTransformer2DModel": TensorPlan(_FLUX),
    "CosmosTransformer3DModel": TensorPlan(_under("transformer_blocks.*", _COSMOS), counters=_BOTH_ATTENTIONS),
    "FluxTransformer2DModel": TensorPlan(_FLUX),
    "HiDreamImageTransformer2DModel": TensorPlan(
        _in_all(("double_stream_blocks.*.block", "single_stream_blocks.*.block"), _HIDREAM),
        counters=("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
    ),
    "HunyuanImageTransformer2DModel": TensorPlan(_FLUX, counters=_OF_FLUX),
    "HunyuanVideoTransformer3DModel": TensorPlan(_FLUX, counters=_OF_FLUX),
    "HunyuanVideo15Transformer3DModel": TensorPlan(_FLUX, counters=_OF_FLUX),
    "LTXVideoTransformer3DModel": TensorPlan(
        _under("transformer_blocks.*", _LTX),
        counters=_BOTH_ATTENTIONS,
        narrowed={"transformer_blocks.*.attn1": "image_rotary_emb"},
    ),
    "Lumina2Transformer2DModel": TensorPlan(
        _in_all(_REFINED, _LUMINA), heads=_GROUPED, counters=tuple(f"{one}.attn" for one in _REFINED)
    ),
    "OmniGen2Transformer2DModel": TensorPlan(_in_all(_REFINED, _LUMINA), heads=_GROUPED),
    "OpenSoraTransformer": TensorPlan(_OPEN_SORA, heads=("num_heads",)),
    "QwenImageTransformer2DModel": TensorPlan(_under("transformer_blocks.*", _QWEN_IMAGE)),
    "SD3Transformer2DModel": TensorPlan(
        _under("transformer_blocks.*", _SD3), counters=("transformer_blocks.*.attn", "transformer_blocks.*.attn2")
    ),
    "WanTransformer3DModel": TensorPlan(_under("blocks.*", _WAN), counters=("blocks.*.attn1", "blocks.*.attn2")),
    "ZImageTransformer2DModel": TensorPlan(
        _in_all(_REFINED, _Z_IMAGE),
        heads=("n_heads", "n_kv_heads"),
        counters=tuple(f"{one}.attention" for one in _REFINED),
    ),
}
