"""Open-Sora 2.0's diffusion network: video and text in one sequence of tokens, with given frames beside the noisy ones.

Peng et al. 2025, "Open-Sora 2.0", arXiv 2503.09642. A Flux-like transformer (MMDiT, Esser et al. 2024): double blocks
have weights of their own for text and video, single blocks see both as one sequence, text first. What is particular:

- Given frames come in as further channels of every token (a mask, then the masked latents), through ``cond_in``.
- Positions on three axes: frame, row, column. Text is at (0, 0, 0).
- Queries and keys turn by pairs of channels (j, j + D/2), where Flux pairs (2 j, 2 j + 1); `open_sora_layout` turns
  the weights of one into the other's.

Parameter names are those of the published checkpoint, so that its weights load unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from kinema.networks.open_sora_rotary import Rope, Rotary, rotary_angles, rotate

TIME_WIDTH = 256
"""Width of the sinusoids that times and guidance scales are told by."""
TIME_SCALE = 1000.0
MAX_PERIOD = 10_000.0
NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learnt scale for each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), NORM_EPS)


class QKNorm(nn.Module):
    """The norms of queries and keys, over the channels of a head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(query), self.key_norm(key)


class OpenSoraAttnProcessor:
    """Attention of every token to every token, through diffusers' dispatcher."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, S, heads, D] each -> [B, S, heads D]."""
        output = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return output.flatten(2)


class JointAttention(nn.Module, AttentionModuleMixin):
    """Where diffusers sets the attention kernel and the parallel plan of a block. It has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.set_processor(OpenSoraAttnProcessor())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.processor(self, query, key, value)


class Embedder(nn.Module):
    """Linear, SiLU, linear: of a time, a guidance scale or the pooled text."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(nn.functional.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """``count`` vectors [B, 1, D] made of the vector [B, D] of time and pooled text: shift, scale and gate in turn."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(dim, count * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(nn.functional.silu(vec))[:, None].chunk(self.count, dim=-1)


class StreamAttention(nn.Module):
    """What one stream of a double block brings to the attention of both, and what it takes from it."""

    fusable: ClassVar[Mapping[str, tuple[str, ...]]] = {"qkv": ("q_proj", "k_proj", "v_proj")}
    """The layer that ``fused_projections`` asks for, and of what it can be made."""

    def __init__(self, dim: int, heads: int, bias: bool, fused: bool) -> None:
        super().__init__()
        self.head_dim, self.fused_projections = dim // heads, fused
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        else:
            self.q_proj = nn.Linear(dim, dim, bias=bias)
            self.k_proj = nn.Linear(dim, dim, bias=bias)
            self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.norm = QKNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, hidden] -> [B, S, heads, D] each; queries and keys are normalised."""
        if self.fused_projections:
            parts = self.qkv(x).chunk(3, dim=-1)
        else:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return *self.norm(query, key), value


class DoubleBlock(nn.Module):
    """Text and video attend to each other, each with weights of its own.

    Called as ``block(video [B, N, hidden], text [B, L, hidden], vec [B, hidden], rotary)``, where rotary is that of
    text and video behind one another; returns (video, text).
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, qkv_bias: bool, fused: bool, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        self.img_mod, self.txt_mod = Modulation(dim, 6), Modulation(dim, 6)
        self.img_attn = StreamAttention(dim, heads, qkv_bias, fused)
        self.txt_attn = StreamAttention(dim, heads, qkv_bias, fused)
        self.img_mlp, self.txt_mlp = _mlp(dim, mlp_dim), _mlp(dim, mlp_dim)
        self.attention = JointAttention()

    def forward(self, video: Tensor, text: Tensor, vec: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        video_mod, text_mod = self.img_mod(vec), self.txt_mod(vec)
        of_text = self.txt_attn.queries_keys_values(_modulated(text, *text_mod[:2]))
        of_video = self.img_attn.queries_keys_values(_modulated(video, *video_mod[:2]))
        query, key, value = (torch.cat(both, dim=1) for both in zip(of_text, of_video, strict=True))
        attended = self.attention(rotate(query, rotary, self.rope), rotate(key, rotary, self.rope), value)
        for_text, for_video = attended.split([text.shape[1], video.shape[1]], dim=1)
        video = video + video_mod[2] * self.img_attn.proj(for_video)
        video = video + video_mod[5] * self.img_mlp(_modulated(video, *video_mod[3:5]))
        text = text + text_mod[2] * self.txt_attn.proj(for_text)
        text = text + text_mod[5] * self.txt_mlp(_modulated(text, *text_mod[3:5]))
        return video, text


class SingleBlock(nn.Module):
    """Text and video as one sequence; attention and the feed-forward part run side by side.

    Called as ``block(tokens [B, L + N, hidden], vec [B, hidden], rotary)``; returns tokens.
    """

    fusable: ClassVar[Mapping[str, tuple[str, ...]]] = {"linear1": ("q_proj", "k_proj", "v_mlp")}

    def __init__(self, dim: int, heads: int, mlp_dim: int, fused: bool, rope: Rope) -> None:
        super().__init__()
        self.head_dim, self.fused_projections, self.rope = dim // heads, fused, rope
        self.sizes = dim, dim, dim, mlp_dim
        if fused:
            self.linear1 = nn.Linear(dim, 3 * dim + mlp_dim)
        else:
            self.q_proj = nn.Linear(dim, dim)
            self.k_proj = nn.Linear(dim, dim)
            self.v_mlp = nn.Linear(dim, dim + mlp_dim)
        self.linear2 = nn.Linear(dim + mlp_dim, dim)
        self.norm = QKNorm(self.head_dim)
        self.modulation = Modulation(dim, 3)
        self.attention = JointAttention()

    def forward(self, tokens: Tensor, vec: Tensor, rotary: Rotary) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        inputs = _modulated(tokens, shift, scale)
        if self.fused_projections:
            query, key, value, inner = _in_proportion(self.linear1(inputs), self.sizes)
        else:
            query, key = self.q_proj(inputs), self.k_proj(inputs)
            value, inner = _in_proportion(self.v_mlp(inputs), self.sizes[2:])
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))
        query, key = self.norm(query, key)
        attended = self.attention(rotate(query, rotary, self.rope), rotate(key, rotary, self.rope), value)
        inner = nn.functional.gelu(inner, approximate="tanh")
        return tokens + gate * self.linear2(torch.cat([attended, inner], dim=-1))


class FinalLayer(nn.Module):
    """Tokens of the video to what is predicted of them."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, video: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(_modulated(video, shift, scale))


class OpenSoraTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Open-Sora's network (the defaults are the published model's).

    Args:
        in_channels: channels of a token: those of a latent times ``patch_size`` squared.
        patch_size: latent rows and columns that make one token; the network itself sees tokens only.
        vec_in_dim: width of the pooled text embedding (CLIP-L).
        context_in_dim: width of the text embeddings (T5).
        hidden_size, num_heads: width of the sequence, and heads of attention.
        mlp_ratio: width of the feed-forward parts over ``hidden_size``.
        depth, depth_single_blocks: how many double and single blocks.
        axes_dim: channels of a head that turn with frame, row and column; together they make up a head.
        theta: base of the rotary angles.
        qkv_bias: whether queries, keys and values of double blocks have biases (those of single blocks always have).
        guidance_embed: whether the network is told a guidance scale (distilled models).
        cond_embed: whether it is told given frames.
        fused_qkv: one layer for queries, keys and values (in single blocks with the feed-forward part), or several.
        rope: which channels of a head turn together: "rotate_half" (j, j + D/2), "interleaved" (2 j, 2 j + 1).
    """

    _no_split_modules = ("DoubleBlock", "SingleBlock")
    _repeated_blocks = ("DoubleBlock", "SingleBlock")
    _skip_layerwise_casting_patterns = ("img_in", "cond_in", "txt_in", "time_in", "vector_in", "guidance_in", "norm")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 64,
        patch_size: int = 2,
        vec_in_dim: int = 768,
        context_in_dim: int = 4096,
        hidden_size: int = 3072,
        num_heads: int = 24,
        mlp_ratio: float = 4.0,
        depth: int = 19,
        depth_single_blocks: int = 38,
        axes_dim: tuple[int, ...] = (16, 56, 56),
        theta: int = 10_000,
        qkv_bias: bool = True,
        guidance_embed: bool = False,
        cond_embed: bool = True,
        fused_qkv: bool = False,
        rope: Rope = "rotate_half",
    ) -> None:
        super().__init__()
        assert hidden_size == num_heads * sum(axes_dim), "the axes' channels must make up a head"
        mlp_dim = int(hidden_size * mlp_ratio)
        self.img_in = nn.Linear(in_channels, hidden_size)
        self.cond_in = nn.Linear(in_channels + patch_size**2, hidden_size) if cond_embed else None
        self.txt_in = nn.Linear(context_in_dim, hidden_size)
        self.time_in = Embedder(TIME_WIDTH, hidden_size)
        self.vector_in = Embedder(vec_in_dim, hidden_size)
        self.guidance_in = Embedder(TIME_WIDTH, hidden_size) if guidance_embed else None
        self.double_blocks = nn.ModuleList(
            DoubleBlock(hidden_size, num_heads, mlp_dim, qkv_bias, fused_qkv, rope) for _ in range(depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(hidden_size, num_heads, mlp_dim, fused_qkv, rope) for _ in range(depth_single_blocks)
        )
        self.final_layer = FinalLayer(hidden_size, in_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Initial weights as of DiT (Peebles and Xie 2023): an untrained network predicts zero, its blocks change
        nothing, and given frames are not seen."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")) or name == "cond_in":
                nn.init.zeros_(module.weight)
            elif name.startswith(("time_in", "vector_in", "guidance_in")):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor | None = None,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict the velocity eps - x_0.

        Args:
            hidden_states: tokens of the noisy latents [B, N, ``in_channels``] (`pack`).
            timestep: [B] in [0, 1], 1 is noise. Give it in float32: the type of the weights would round it.
            encoder_hidden_states: T5's embeddings [B, L, ``context_in_dim``] of the text and its padding, which is
                attended to.
            pooled_projections: CLIP's pooled embedding [B, ``vec_in_dim``].
            img_ids: positions of the tokens [N, 3] or [B, N, 3] (`positions`).
            txt_ids: positions of the text [L, 3] or [B, L, 3]; None: zeros.
            cond: given frames [B, N, ``in_channels`` + ``patch_size``^2]: of each token, its mask and its masked
                latents (`pack` of both, mask first). None: none is given, as zeros.
            guidance: the guidance scale [B] that distilled networks are told.
            return_dict: whether to return a ``Transformer2DModelOutput`` or its one value in a tuple.

        Returns:
            The prediction in ``sample``, [B, N, ``in_channels``].
        """
        rotary = self._rotary(img_ids, txt_ids, encoder_hidden_states.shape[1])
        vec = self._vector(timestep, guidance, pooled_projections, hidden_states.dtype)
        video = self.img_in(hidden_states)
        if self.cond_in is not None:
            if cond is None:
                cond = hidden_states.new_zeros(*hidden_states.shape[:2], self.cond_in.in_features)
            video = video + self.cond_in(cond)
        else:
            assert cond is None, "this network has no cond_in that would be told of given frames"
        text = self.txt_in(encoder_hidden_states)
        for block in self.double_blocks:
            video, text = block(video, text, vec, rotary)
        tokens = torch.cat([text, video], dim=1)
        for block in self.single_blocks:
            tokens = block(tokens, vec, rotary)
        sample = self.final_layer(tokens[:, text.shape[1] :], vec)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _vector(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, hidden]: time, guidance and pooled text, which modulate every block."""
        vec = self.time_in(sinusoids(timestep).to(dtype))
        if self.guidance_in is not None:
            assert guidance is not None, "a network with guidance_embed is told a guidance scale"
            vec = vec + self.guidance_in(sinusoids(guidance).to(dtype))
        return vec + self.vector_in(pooled)

    def _rotary(self, img_ids: Tensor, txt_ids: Tensor | None, text_length: int) -> Rotary:
        if txt_ids is None:
            txt_ids = img_ids.new_zeros(*img_ids.shape[:-2], text_length, img_ids.shape[-1])
        config = self.config
        return rotary_angles(torch.cat([txt_ids, img_ids], dim=-2), config.axes_dim, config.theta, config.rope)


def sinusoids(t: Tensor) -> Tensor:
    """[cos, sin] of 1000 t f with f_i = 10000^(-i / 128), float32 [B, 256]."""
    half = TIME_WIDTH // 2
    rates = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = TIME_SCALE * t.float()[:, None] * rates
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def pack(latents: Tensor, patch: int) -> Tensor:
    """[B, C, T, H, W] -> tokens [B, T H/p W/p, C p p]: frame by frame, row by row; of each channel its p x p."""
    cells = latents.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpack(tokens: Tensor, size: Sequence[int], patch: int) -> Tensor:
    """The inverse, to [B, C, *size] with ``size`` = (T, H, W) of the latents."""
    frames, rows, columns = size[0], size[1] // patch, size[2] // patch
    cells = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, (frames, rows, columns))
    return cells.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def positions(size: Sequence[int], patch: int, device: torch.device | str = "cpu") -> Tensor:
    """Frame, row and column of each token of latents of ``size`` (T, H, W), float32 [N, 3]."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (size[0], size[1] // patch, size[2] // patch)]
    return torch.cartesian_prod(*axes)


def _mlp(dim: int, mlp_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_dim, dim))


def _in_proportion(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Split the channels of x, of which a tensor-parallel peer has as large a share of each part."""
    share = x.shape[-1] / sum(sizes)
    return x.split([round(size * share) for size in sizes], dim=-1)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then shift and scale [B, 1, D]."""
    return (1 + scale) * nn.functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS) + shift
