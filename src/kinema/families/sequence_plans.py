"""How sequence parallel splits each network's blocks: facts by the class of the network, which diffusers names.

A *stream* is an argument of a block that holds tokens [B, L, D]: the picture, and where it is joined by one, the text.
Streams are split over the processes at a list's first block and put together after its last; all that a plan does
not name is the same on every process: times, pooled text, the text of cross attention, masks of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kinema.families.class_facts import of_class

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """An argument with an entry for every token of these streams, one behind the other, along dimension ``dim``.

    ``ndim``: it has entries for tokens only if it has that many dimensions; with others it is whole. One of length 1
    serves all tokens. A tuple of tensors has them in each.
    """

    streams: tuple[str, ...]
    dim: int = 1
    ndim: int | None = None


@dataclass(frozen=True)
class First:
    """An argument that is the number of tokens at the beginning of a stream that are something particular."""

    stream: str


@dataclass(frozen=True)
class Attention:
    """One call of attention in a block: the streams of its queries in their order in the sequence. Its keys are the
    same tokens, or, where ``whole_keys``, some that every process has all of (cross attention)."""

    streams: tuple[str, ...]
    whole_keys: bool = False


@dataclass(frozen=True)
class BlockPlan:
    """How the blocks of one list are split."""

    streams: tuple[str, ...]
    """The arguments that are split, in the order in which a block returns them."""
    attention: tuple[Attention, ...]
    """The calls of attention in the order of a block; further calls are as the last."""
    arguments: Mapping[str, Tokens | tuple[Tokens, ...] | First] = field(default_factory=dict)
    """Further arguments that go with the tokens; a tuple for a tuple of tensors that differ."""
    regrouped: tuple[str, ...] = ()
    """Streams that the network takes apart between blocks: they are put together after every block."""
    optional_calls: int = 0
    """How many of the calls of attention only some blocks of the list make."""
    mask: Callable[[Mapping[str, Any], Mapping[str, int]], Tensor | None] | None = None
    """Makes attention's mask of the whole sequence, where a block makes it itself of the tokens that it sees: from the
    block's other arguments, whole, and the length of every stream."""


def sequence_plans(network: nn.Module) -> Mapping[str, BlockPlan] | None:
    """The plan of each list of blocks that is split, by its name; None for a network that has none.

    Lists without a plan run whole on every process: they refine short texts.
    """
    return of_class(network, PLANS)


REFUSED: Mapping[str, str] = {
    "sdxl": "its network is made of convolutions, which reach beyond the tokens that a process would hold",
}
"""Families without sequence parallel, and why."""


def _self_attention(
    stream: str, arguments: Mapping[str, Tokens | tuple[Tokens, ...] | First] | None = None
) -> BlockPlan:
    """Blocks over one sequence, in which every token attends to every token."""
    return BlockPlan((stream,), (Attention((stream,)),), arguments or {})


def _cross_attention(arguments: Mapping[str, Tokens]) -> BlockPlan:
    """Blocks in which tokens attend to each other, then to a text or a picture that stays whole."""
    hidden = ("hidden_states",)
    return BlockPlan(hidden, (Attention(hidden), Attention(hidden, whole_keys=True)), arguments)


def _qwen_image_mask(arguments: Mapping[str, Any], lengths: Mapping[str, int]) -> Tensor | None:
    """bool [B, 1, 1, L + N]: of the text the real tokens are seen, of the picture all."""
    text_mask = arguments["encoder_hidden_states_mask"]
    if text_mask is None:
        return None
    import torch

    picture_mask = text_mask.new_ones(text_mask.shape[0], lengths["hidden_states"], dtype=torch.bool)
    return torch.cat([text_mask.bool(), picture_mask], dim=1)[:, None, None, :]


def _hunyuan_video15_mask(arguments: Mapping[str, Any], lengths: Mapping[str, int]) -> Tensor:
    """bool [B, 1, N + L, N + L]: real tokens see real tokens."""
    import torch

    text_mask = arguments["attention_mask"].bool()
    video_mask = text_mask.new_ones(text_mask.shape[0], lengths["hidden_states"])
    real = torch.cat([video_mask, text_mask], dim=1)
    return real[:, None, None, :] & real[:, None, :, None]


_HIDDEN, _TEXT = ("hidden_states",), ("encoder_hidden_states",)

_FLUX = BlockPlan(_TEXT + _HIDDEN, (Attention(_TEXT + _HIDDEN),), {"image_rotary_emb": Tokens(_TEXT + _HIDDEN, dim=0)})
_ROTARY_OF_PICTURE = {name: Tokens(_HIDDEN, dim=0) for name in ("freqs_cis", "image_rotary_emb")}
_HUNYUAN_VIDEO = BlockPlan(
    _HIDDEN + _TEXT, (Attention(_HIDDEN + _TEXT),), {**_ROTARY_OF_PICTURE, "num_tokens": First("hidden_states")}
)
_LUMINA = _self_attention("hidden_states", {"image_rotary_emb": Tokens(_HIDDEN)})
_Z_IMAGE = _self_attention("x", {"freqs_cis": Tokens(("x",)), "noise_mask": Tokens(("x",))})

PLANS: Mapping[str, Mapping[str, BlockPlan]] = {
    "AuraFlowTransformer2DModel": {
        "joint_transformer_blocks": BlockPlan(_TEXT + _HIDDEN, (Attention(_TEXT + _HIDDEN),)),
        "single_transformer_blocks": _self_attention("hidden_states"),
    },
    "ChromaTransformer2DModel": {
        "transformer_blocks": _FLUX,
        "single_transformer_blocks": _self_attention("hidden_states", {"image_rotary_emb": Tokens(_HIDDEN, dim=0)}),
    },
    "CosmosTransformer3DModel": {
        "transformer_blocks": _cross_attention(
            {
                "embedded_timestep": Tokens(_HIDDEN, ndim=3),
                "temb": Tokens(_HIDDEN, ndim=3),
                "image_rotary_emb": Tokens(_HIDDEN, dim=0),
                "extra_pos_emb": Tokens(_HIDDEN),
            }
        ),
    },
    "FluxTransformer2DModel": {"transformer_blocks": _FLUX, "single_transformer_blocks": _FLUX},
    "HiDreamImageTransformer2DModel": {
        # Between blocks the text of another layer of Llama is put in the place of the last one's.
        "double_stream_blocks": BlockPlan(
            _HIDDEN + _TEXT,
            (Attention(_HIDDEN + _TEXT),),
            {"image_rotary_emb": Tokens(_HIDDEN + _TEXT), "hidden_states_masks": Tokens(_HIDDEN)},
            regrouped=_TEXT,
        ),
        "single_stream_blocks": BlockPlan(
            _HIDDEN,
            (Attention(_HIDDEN),),
            {"image_rotary_emb": Tokens(_HIDDEN), "hidden_states_masks": Tokens(_HIDDEN)},
            regrouped=_HIDDEN,
        ),
    },
    "HunyuanImageTransformer2DModel": {
        "transformer_blocks": _HUNYUAN_VIDEO,
        "single_transformer_blocks": _HUNYUAN_VIDEO,
    },
    "HunyuanVideoTransformer3DModel": {
        "transformer_blocks": _HUNYUAN_VIDEO,
        "single_transformer_blocks": _HUNYUAN_VIDEO,
    },
    "HunyuanVideo15Transformer3DModel": {
        "transformer_blocks": BlockPlan(
            _HIDDEN + _TEXT,
            (Attention(_HIDDEN + _TEXT),),
            {**_ROTARY_OF_PICTURE, "attention_mask": Tokens(_TEXT)},
            mask=_hunyuan_video15_mask,
        ),
    },
    "LTXVideoTransformer3DModel": {
        "transformer_blocks": _cross_attention({"temb": Tokens(_HIDDEN), "image_rotary_emb": Tokens(_HIDDEN)}),
    },
    "Lumina2Transformer2DModel": {name: _LUMINA for name in ("context_refiner", "noise_refiner", "layers")},
    "OmniGen2Transformer2DModel": {
        name: _LUMINA for name in ("context_refiner", "noise_refiner", "ref_image_refiner", "layers")
    },
    "OpenSoraTransformer": {
        "double_blocks": BlockPlan(
            ("video", "text"), (Attention(("text", "video")),), {"rotary": Tokens(("text", "video"))}
        ),
        "single_blocks": _self_attention("tokens", {"rotary": Tokens(("tokens",))}),
    },
    "QwenImageTransformer2DModel": {
        "transformer_blocks": BlockPlan(
            _TEXT + _HIDDEN,
            (Attention(_TEXT + _HIDDEN),),
            {
                "encoder_hidden_states_mask": Tokens(_TEXT),
                "image_rotary_emb": (Tokens(_HIDDEN, dim=0), Tokens(_TEXT, dim=0)),
                "modulate_index": Tokens(_HIDDEN),
            },
            mask=_qwen_image_mask,
        ),
    },
    "SD3Transformer2DModel": {
        "transformer_blocks": BlockPlan(
            _TEXT + _HIDDEN, (Attention(_HIDDEN + _TEXT), Attention(_HIDDEN)), optional_calls=1
        ),
    },
    "WanTransformer3DModel": {
        "blocks": _cross_attention({"temb": Tokens(_HIDDEN, ndim=4), "rotary_emb": Tokens(_HIDDEN)}),
    },
    "ZImageTransformer2DModel": {name: _Z_IMAGE for name in ("noise_refiner", "context_refiner", "layers")},
}
